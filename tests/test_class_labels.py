"""Columns of classes (`ClassLabel`): rows have the names, as a reader of `datasets` sees them."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dagster_project.core.errors import InputError
from dagster_project.curation.check_files import check_paths, load
from dagster_project.curation.sources.files import read_rows
from dagster_project.curation.sources.reading import Reading, Source, read_sources

TEXTS = ["Fine film.", "Dull film.", "Great cast."]
FEATURES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
CARD = """---
license: mit
dataset_info:
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': neg
          '1': pos
  - name: tags
    sequence:
      class_label:
        names: {'0': O, '1': B}
  splits:
  - name: train
---
# Films
"""


def films() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": TEXTS, "label": [1, 0, 1]}, features=FEATURES)


def answers(path: Path) -> list[str]:
    return [record["messages"][-1]["content"] for record in load([str(path)]).records]


def test_names_come_from_the_metadata_of_parquet_and_arrow_files(tmp_path: Path) -> None:
    films().to_parquet(tmp_path / "films.parquet")
    films().save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    for path in (tmp_path / "films.parquet", arrow, tmp_path / "saved"):
        assert answers(path) == ["pos", "neg", "pos"]


def test_names_of_a_saved_data_set_come_from_its_information_if_the_file_has_none(tmp_path: Path) -> None:
    datasets.DatasetDict(train=films()).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved/train").glob("*.arrow")
    table = pa.ipc.open_stream(arrow.read_bytes()).read_all().replace_schema_metadata(None)
    with pa.ipc.new_stream(str(arrow), table.schema) as stream:
        stream.write_table(table)
    assert answers(tmp_path / "saved") == ["pos", "neg", "pos"]
    (tmp_path / "saved/train/dataset_info.json").write_text("{}")
    assert answers(tmp_path / "saved") == ["1", "0", "1"]


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "data/train-00000-of-00001.parquet"])
def test_names_of_a_repository_come_from_its_readme(tmp_path: Path, name: str) -> None:
    path = tmp_path / "films" / name
    path.parent.mkdir(parents=True)
    (tmp_path / "films/README.md").write_text(CARD)
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, [1, 0, 1], strict=True)]
    if name.endswith("csv"):
        path.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    elif name.endswith("jsonl"):
        path.write_text("".join(json.dumps({**row, "tags": [0, 1]}) + "\n" for row in rows))
        assert [row.value["tags"] for row in read_rows(tmp_path / "films") if row.value] == [["O", "B"]] * 3
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    assert answers(tmp_path / "films") == ["pos", "neg", "pos"]


def test_configurations_of_a_readme_name_the_classes_of_their_own_files(tmp_path: Path) -> None:
    info = "- config_name: {0}\n  features:\n  - name: label\n    dtype:\n      class_label:\n        names: {1}\n"
    infos = info.format("small", "[no, yes]") + info.format("large", "[bad, good]")
    for folder in ("small", "large"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.csv").write_text("text,label\nHi,1\n")
    (tmp_path / "README.md").write_text(f"---\ndataset_info:\n{infos}---\n")
    assert answers(tmp_path) == ["good", "yes"]  # large/, small/
    (tmp_path / "small").rename(tmp_path / "other")
    with pytest.raises(InputError, match=r"column 'label' of other/train\.csv has different classes"):
        answers(tmp_path)
    configs = "configs:\n- config_name: small\n  data_files:\n  - split: train\n    path: other/*.csv\n"
    (tmp_path / "README.md").write_text(f"---\ndataset_info:\n{infos}{configs}---\n")
    assert answers(tmp_path) == ["good", "yes"]


def test_classes_inside_objects_and_lists_are_named(tmp_path: Path) -> None:
    word = datasets.Features({"of": datasets.ClassLabel(names=["O", "B"]), "at": datasets.Value("int64")})
    features = datasets.Features({**FEATURES, "words": datasets.List(word), "meta": word})
    row = {"text": "Hi", "label": -1, "words": [{"of": 1, "at": 1}, {"of": -1, "at": 0}], "meta": {"of": 0, "at": 7}}
    datasets.Dataset.from_list([row], features=features).to_parquet(tmp_path / "a.parquet")
    (read,) = read_rows(tmp_path / "a.parquet")
    words = [{"of": "B", "at": 1}, {"of": None, "at": 0}]
    assert read.value == {"text": "Hi", "label": None, "words": words, "meta": {"of": "O", "at": 7}}


def test_a_number_without_a_class_makes_its_row_malformed(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "a.csv").write_text("text,label\nHi,pos\nBye,2\nSo,0.5\nLo,\n")
    problems = [row.problem for row in read_rows(tmp_path)]
    assert [problem.partition(": ")[2] for problem in problems] == [
        "",
        "label: 2 is none of the 2 classes of the data set (line 3)",
        "label: 0.5 is none of the 2 classes of the data set (line 4)",
        "",
    ]


@pytest.mark.parametrize("broken", ["license: {mit", "? [[mit], {a: 1}]\n: 1"])
def test_a_broken_header_that_names_classes_is_refused(tmp_path: Path, broken: str) -> None:
    (tmp_path / "README.md").write_text(CARD.replace("license: mit", broken))
    (tmp_path / "a.csv").write_text("text,label\nHi,1\n")
    with pytest.raises(InputError, match="header is not valid YAML"):
        read_rows(tmp_path)


def test_reports_state_which_columns_were_numbers_of_classes(tmp_path: Path) -> None:
    place = tmp_path / "data/sources"
    place.mkdir(parents=True)
    films().to_parquet(place / "films.parquet")
    records, facts = read_sources(
        tmp_path, [Source(path="data/sources/films.parquet", license="MIT")], Reading(), "raw_examples", False, tmp_path
    )
    expected = {"used": {"label": 3, "text": 3}, "class_labels": {"label": 3}}
    assert facts["data/sources/films.parquet"]["fields"] == expected
    assert [record["category"] for record in records.rows()] == ["pos", "neg", "pos"]
    assert check_paths([str(place / "films.parquet")])["fields"] == expected
