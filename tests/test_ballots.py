"""A ballot hides the systems from its raters, loses no vote, and imported votes are counted correctly."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders.ballots import ANSWERS, make_answered_project, record
from builders.browser import CHROMIUM, needs_chromium
from builders.sources import to_pairs

from dagster_project.__main__ import main
from dagster_project.core.errors import InputError
from dagster_project.core.records import write_json, write_records, write_table
from dagster_project.core.text import visible
from dagster_project.evaluation import ballots
from dagster_project.evaluation.evaluator import result_rows, result_schema
from dagster_project.evaluation.paired.bootstrap import wilson
from dagster_project.evaluation.paired.pairwise import (
    Match,
    Pair,
    agreement,
    as_text,
    contenders,
    majority,
    match,
    tally,
)
from dagster_project.training.inference.answers import Answer
from dagster_project.views.ballot import ballot_page


@pytest.fixture
def project(tmp_path: Path) -> Path:
    make_answered_project(tmp_path)
    return tmp_path


@pytest.fixture
def ballot(project: Path) -> Match:
    return match(project, ("lora", "few_shot"), seed=7)


def sheet(ballot: Match, rater: str, wants: Any, n: int = 18) -> dict[str, Any]:
    """What the page saves for a rater who looks at the pairs' own answers: `wants(i, pair)` is the outcome."""
    votes = [{"pair": pair.id, "vote": choice(pair, wants(i, pair))} for i, pair in enumerate(ballot.pairs[:n])]
    return {"ballot": ballot.id, "pairs": n, "seal": ballot.seal(n), "rater": rater, "votes": votes}


def choice(pair: Pair, outcome: str) -> str:
    """What one presses who reads the two answers and wants this outcome."""
    return "tie" if outcome == "tie" else "ab"[pair.shown.index(pair.answers[outcome == "loss"])]


def saved(folder: Path, *sheets: dict[str, Any]) -> list[str]:
    files = [folder / f"votes-{i}.json" for i in range(len(sheets))]
    for file, one in zip(files, sheets, strict=True):
        write_json(file, one)
    return [str(file) for file in files]


def refused(project: Path, files: list[str], *options: str, capsys: Any) -> str:
    capsys.readouterr()
    assert main(["ballots", "import", *files, *options, "--project", str(project)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_the_ballot_compares_the_best_variant_with_the_best_prompted_baseline(project: Path) -> None:
    assert contenders(project) == ("lora", "few_shot")  # TF-IDF is better, and no answer of the base model


def test_answers_that_are_the_same_are_left_out_and_counted(ballot: Match) -> None:
    assert (len(ballot.pairs), ballot.identical) == (ANSWERS - ANSWERS // 4, ANSWERS // 4)
    assert not any("Same" in answer for pair in ballot.pairs for answer in pair.answers)


def test_pairs_and_sides_depend_on_the_seed_and_the_answers(project: Path, ballot: Match) -> None:
    assert match(project, ("lora", "few_shot"), seed=7) == ballot
    other = match(project, ("lora", "few_shot"), seed=8)
    assert other.id != ballot.id and {p.id for p in other.pairs}.isdisjoint(p.id for p in ballot.pairs)
    assert [p.prompt for p in other.pairs] != [p.prompt for p in ballot.pairs]
    rows = result_rows("lora", [record(i) for i in range(ANSWERS)], None, [Answer("New.")] * ANSWERS)
    write_table(project / "data/evaluation/lora/results.parquet", rows, result_schema())
    assert match(project, ("lora", "few_shot"), seed=7).id != ballot.id


def test_each_system_is_shown_first_in_half_of_the_pairs(project: Path) -> None:
    pairs = match(project, ("lora", "tfidf_logistic"), seed=7).pairs
    assert [sum(pair.swapped for pair in pairs[:n]) for n in range(0, ANSWERS + 1, 2)] == list(range(ANSWERS // 2 + 1))
    assert (
        len({tuple(pair.swapped for pair in pairs[i : i + 2]) for i in range(0, ANSWERS, 2)}) == 2
    )  # and nobody knows in which


def test_the_page_contains_nothing_that_identifies_the_systems(project: Path, ballot: Match) -> None:
    html = ballot_page(ballots.document(ballot, 10))
    data = json.loads(re.search(r'id="ballot-data">(.*?)</script>', html, re.S).group(1))
    assert data["ballot"] == ballot.id and len(data["pairs"]) == 10
    assert [set(pair) for pair in data["pairs"]] == [{"id", "prompt", "answers"}] * 10
    assert data["pairs"][0]["answers"] == [visible(answer) for answer in ballot.pairs[0].shown]
    for secret in (
        "lora",
        "few_shot",
        "seed",
        "swapped",
        "Reference",
        *(record(i)["example_id"] for i in range(ANSWERS)),
    ):
        assert secret not in html
    assert (
        "\u202e" not in html
        and html.count("<script") == 2
        and "default-src 'none'" in html
        and "http" not in html.split("<style>")[1]
    )
    assert ballot_page(ballots.document(match(project, ("lora", "few_shot"), seed=7), 10)) == html


def test_votes_are_counted_by_system_independent_of_its_side(project: Path, ballot: Match, capsys: Any) -> None:
    anna = sheet(ballot, "Anna", lambda i, pair: "win" if i < 12 else "tie" if i < 15 else "loss")
    assert main(["ballots", "import", *saved(project, anna), "--json", "--project", str(project)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["systems"] == ["lora", "few_shot"] and found["raters"] == {"Anna": 18}
    assert {key: found[key] for key in ("pairs", "wins", "ties", "losses", "win_rate")} == {
        "pairs": 18, "wins": 12, "ties": 3, "losses": 3, "win_rate": 0.75,
    }  # fmt: skip
    assert found["interval_method"].startswith("Wilson") and found["interval"][0] < 0.75 < found["interval"][1]
    assert set(found["categories"]) == {"login", "billing"} and found["agreement"]["alpha"] is None
    assert sum(part["pairs"] for part in found["categories"].values()) == sum(
        pair.category is not None for pair in ballot.pairs
    )
    assert found["places"]["a"] + found["places"]["b"] == 15 and found["places"]["tie"] == 3


def test_a_pair_counts_once_by_majority_and_agreement_is_reported(project: Path, ballot: Match, capsys: Any) -> None:
    files = saved(
        project,
        sheet(ballot, "Anna", lambda i, pair: "win"),
        sheet(ballot, "Ben", lambda i, pair: "win" if i % 2 else "loss"),
        sheet(ballot, "Cleo", lambda i, pair: "loss", n=9),
    )
    assert main(["ballots", "import", *files, "--project", str(project)]) == 0
    out = capsys.readouterr().out
    # on the odd ones Anna and Ben agree; Cleo decides the even ones of the first nine, and those after them are ties
    assert "45 votes of Anna, Ben, Cleo" in out and "lora against few_shot: 9 wins, 4 ties, 5 losses in 18 pairs" in out
    # pairs of raters that agree: 5 x 1 + 4 x 1 of the 27 on the first nine, 5 of the 9 on the others
    assert "18 pairs with several votes: two raters agree in 38.9 % of cases; Krippendorff's alpha -0." in out


def test_one_of_something_is_not_written_in_the_plural(ballot: Match) -> None:
    pairs = ballot.pairs[:1]
    text = ballots.votes_text(
        ballots.result(ballot, {name: {pairs[0].id: choice(pairs[0], "loss")} for name in ("Anna", "Ben")})
    )
    assert "lora against few_shot: 0 wins, 0 ties, 1 loss in 1 pair\n" in text
    assert "1 pair with several votes: two raters agree in 100.0 % of cases" in text
    assert text.count("undefined, because all of these votes have the same outcome") == 1


def test_the_majority_is_the_most_frequent_outcome_and_a_draw_is_a_tie() -> None:
    assert majority(["win"]) == "win"
    assert majority(["win", "loss", "loss"]) == "loss"
    assert (
        majority(["win", "loss"])
        == majority(["win", "tie", "tie"])
        == majority(["win", "win", "tie", "tie", "loss"])
        == "tie"
    )


def test_krippendorffs_alpha_matches_his_published_example() -> None:
    """Krippendorff 2011, example C: four observers, twelve units, missing data; nominal alpha .743."""
    rows = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    units = [[row[i] for row in rows if row[i] != "."] for i in range(12)]
    found = agreement(units)
    assert found["alpha"] == 0.7434 and found["pairs"] == 11
    assert agreement([["win", "win"], ["loss", "loss"]]) == {"pairs": 2, "percent": 100.0, "alpha": 1.0}
    assert agreement([["win", "win"]])["alpha"] is None  # nobody ever said anything else
    assert agreement([["win"], ["loss"]]) == {"pairs": 0, "percent": None, "alpha": None}


def test_the_interval_is_the_wilson_interval() -> None:
    assert [round(bound, 4) for bound in wilson(0.81, 100)] == [
        0.7222,
        0.8749,
    ]  # Newcombe 1998: 81 of 263 is .2553 to .3662
    assert [round(bound, 4) for bound in wilson(81 / 263, 263)] == [0.2553, 0.3662]
    assert wilson(1, 12)[1] == 1 and 0.75 < wilson(1, 12)[0] < 0.77


def test_near_copies_and_turns_of_one_example_count_as_one_in_the_interval() -> None:
    outcomes = ["win", "win", "win", "loss"]
    pairs = [Pair(f"{i}", [], "login", ("a", "b"), False, unit=f"group {i % 4}") for i in range(12)]
    found = tally(pairs, {pair.id: outcomes[i % 4] for i, pair in enumerate(pairs)})
    assert (found["pairs"], found["wins"], found["win_rate"]) == (12, 9, 0.75)
    assert (
        found["interval"] == found["categories"]["login"]["interval"] == [round(bound, 4) for bound in wilson(0.75, 4)]
    )
    assert "turns of one conversation as one" in as_text({**found, "systems": ["x", "y"]})[1]
    first = tally(pairs[:4], {pair.id: "win" for pair in pairs[:4]})
    assert (
        first["interval"] == [round(bound, 4) for bound in wilson(1, 4)] and first["interval_method"] == "Wilson, 95 %"
    )


def test_near_copies_in_the_test_split_share_the_unit_of_their_pairs(project: Path) -> None:
    records = [record(i) | {"group_id": f"group {i % 5}"} for i in range(ANSWERS)]
    shutil.rmtree(project / "data/splits/test")
    write_records(project / "data/splits/test", records)
    assert {pair.unit for pair in match(project, ("lora", "few_shot"), seed=7).pairs} == {
        f"group {i}" for i in range(5)
    }


def test_control_characters_in_a_name_are_escaped(project: Path, ballot: Match, capsys: Any) -> None:
    assert (
        main(
            [
                "ballots",
                "import",
                *saved(project, sheet(ballot, "A\x1b[2J", lambda i, pair: "win")),
                "--project",
                str(project),
            ]
        )
        == 0
    )
    assert "18 votes of A\\x1b[2J" in capsys.readouterr().out


def test_a_line_break_in_a_name_makes_no_line_of_the_result(project: Path, ballot: Match, capsys: Any) -> None:
    name = "Anna\nlora against few_shot: 18 wins"
    assert main(["ballots", "import", *saved(project, sheet(ballot, name, lambda i, _: "loss")), *at(project)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"ballot {ballot.id}: 18 votes of Anna\\nlora against few_shot: 18 wins"
    assert lines[1] == "lora against few_shot: 0 wins, 0 ties, 18 losses in 18 pairs"


def at(project: Path) -> list[str]:
    return ["--project", str(project)]


def test_the_result_states_what_the_pairs_were_taken_from(project: Path, ballot: Match, capsys: Any) -> None:
    ten = sheet(ballot, "Anna", lambda i, pair: "win", n=10)
    assert main(["ballots", "import", *saved(project, ten), *at(project)]) == 0
    out, err = capsys.readouterr()
    assert "10 wins, 0 ties, 0 losses in 10 pairs" in out and "left out" not in err
    assert out.endswith(
        "both answered 24 of 24 test examples: 18 pairs of different answers, 6 of the same answer left out\n"
    )


def test_answers_that_are_older_than_the_test_split_are_counted(project: Path, capsys: Any) -> None:
    """Of 24 answered examples the split keeps 12 and gains 10: 12 answers of each system are to examples that left."""
    shutil.rmtree(project / "data/splits/test")
    write_records(project / "data/splits/test", [record(i) for i in range(12, 34)])
    rows = result_rows("lora", [record(i) for i in range(ANSWERS)], None, [Answer("New.")] * 20 + [None] * 4)
    write_table(project / "data/evaluation/lora/results.parquet", rows, result_schema())
    anna = sheet(match(project, ("lora", "few_shot"), seed=7), "Anna", lambda i, pair: "win", n=8)
    for command in (
        ["ballots", "export", "lora", "few_shot"],
        ["ballots", "import", *saved(project, anna)],
    ):
        assert main([*command, "--json", *at(project)]) == 0
        out, err = capsys.readouterr()
        found = json.loads(out)
        assert {name: found[name] for name in ("answered", "test_examples", "outdated", "unmatched", "of")} == {
            "answered": 8, "test_examples": 22, "outdated": 12, "unmatched": 4, "of": 8,
        }  # fmt: skip
        assert "answers to 12 questions are left out, because data/splits/test does not have the example" in err
        assert "4 questions left out that only one of them has answered" in err


def test_a_file_of_preferences_has_at_least_one_pair(project: Path, ballot: Match, capsys: Any) -> None:
    out = project / "preferences.jsonl"
    out.write_text("of an earlier import\n")
    files = saved(project, sheet(ballot, "Anna", lambda i, pair: "tie"))
    assert "no pair has a winner" in refused(project, files, "--preferences", str(out), capsys=capsys)
    assert out.read_text() == "of an earlier import\n"


def test_pairs_without_a_vote_do_not_count(ballot: Match) -> None:
    assert tally(ballot.pairs, {ballot.pairs[0].id: "win", ballot.pairs[1].id: "tie"})["win_rate"] == 0.75


def test_a_bad_file_is_refused_with_all_of_its_errors(project: Path, ballot: Match, capsys: Any) -> None:
    good = sheet(ballot, "Anna", lambda i, pair: "win")
    unknown = good | {"votes": [{"pair": "0123456789ab", "vote": "a"}, *good["votes"][:-2], good["votes"][0]]}
    err = refused(project, saved(project, unknown, good), capsys=capsys)
    for said in (
        "1 pair not on the ballot (first: 0123456789ab)",
        "1 pair voted on more than once",
        "1 of 18 pairs without a vote",
        "all by rater 'Anna'",
    ):
        assert said in err
    assert "finish the ballot, or count incomplete ballots with --partial" in err

    assert "votes-0.json: votes.votes.0.vote" in refused(
        project, saved(project, good | {"votes": [{"pair": "x", "vote": "c"}]}), capsys=capsys
    )
    assert "give the --seed of the export" in refused(project, saved(project, good), "--seed", "8", capsys=capsys)
    other = sheet(match(project, ("few_shot", "lora"), seed=7), "Ben", lambda i, pair: "win")
    assert "the votes are on 2 ballots" in refused(project, saved(project, good, other), capsys=capsys)
    (project / "votes.json").write_text("{")
    assert "votes.json: not JSON" in refused(project, [str(project / "votes.json")], capsys=capsys)
    assert "No such file" in refused(project, [str(project / "none.json")], capsys=capsys)
    (project / "votes.json").write_text(json.dumps(good)[:-1] + ', "votes": []}')
    assert "votes.json: key 'votes' is duplicated in one object" in refused(
        project, [str(project / "votes.json")], capsys=capsys
    )
    (project / "votes.json").write_text("null")
    assert "votes.json: votes: Input should be" in refused(project, [str(project / "votes.json")], capsys=capsys)
    for name in (" ", "\u200b"):
        assert "votes.rater: no name" in refused(project, saved(project, good | {"rater": name}), capsys=capsys)
    assert "no vote" in refused(project, saved(project, good | {"votes": []}), "--partial", capsys=capsys)


def test_an_unfinished_ballot_counts_with_the_option_partial(project: Path, ballot: Match, capsys: Any) -> None:
    half = sheet(ballot, "Anna", lambda i, pair: "win")
    half["votes"] = half["votes"][:9]
    assert main(["ballots", "import", *saved(project, half), "--partial", "--json", "--project", str(project)]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 9


def test_import_accepts_the_seed_of_another_ballot(project: Path, capsys: Any) -> None:
    ballot = match(project, ("few_shot", "lora"), seed=99)
    files = saved(project, sheet(ballot, "Anna", lambda i, pair: "win"))
    assert main(["ballots", "import", *files, "--seed", "99", "--json", "--project", str(project)]) == 0
    assert json.loads(capsys.readouterr().out)["systems"] == ["few_shot", "lora"]


def test_exported_majorities_are_read_as_preference_pairs(project: Path, capsys: Any) -> None:
    ballot = match(project, ("few_shot", "tfidf_logistic"), seed=7)
    anna = sheet(ballot, "Anna", lambda i, pair: ("win", "tie", "loss")[i % 3])
    out = project / "preferences.jsonl"
    assert main(["ballots", "import", *saved(project, anna), "--preferences", str(out), "--project", str(project)]) == 0
    capsys.readouterr()
    assert main(["check", str(out), "--format", "preference", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["rows"], found["kept"]) == ("preference", 12, 12)
    layout, pairs = to_pairs(out, "preferences.jsonl")
    assert layout == "preference"
    decided = [pair for i, pair in enumerate(ballot.pairs[:18]) if i % 3 != 1]
    assert [pair["prompt"] for pair in pairs] == [pair.prompt for pair in decided]
    assert [pair["category"] for pair in pairs] == [pair.category for pair in decided]
    for i, (pair, source) in enumerate(zip(pairs, decided, strict=True)):
        better, worse = source.answers if i % 2 == 0 else source.answers[::-1]
        assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == (better, worse)


def test_export_reports_what_it_wrote_and_refuses_impossible_requests(project: Path, capsys: Any) -> None:
    def export(*arguments: str) -> int:
        return main(["ballots", "export", *arguments, "--project", str(project)])

    assert export("--json", "--n", "10") == 0
    found = json.loads(capsys.readouterr().out)
    assert found | {"file": "", "ballot": ""} == {
        "ballot": "", "systems": ["lora", "few_shot"], "seed": 7, "pairs": 10, "of": 18, "identical": 6, "file": "",
        "answered": ANSWERS, "test_examples": ANSWERS, "outdated": 0, "unmatched": 0,
    }  # fmt: skip
    assert Path(found["file"]).name == f"{found['ballot']}.html"  # a name that tells no rater which systems they are
    assert "Which answer is better?" in Path(found["file"]).read_text(encoding="utf-8")
    for arguments, said in (
        (["lora"], "1 system given"),
        (["lora", "dora"], "systems with answers: few_shot, tfidf_logistic, lora"),
        (["lora", "lora"], "both systems are 'lora'"),
        (["--out", str(project / "page.txt")], "must end in .html"),
    ):
        assert export(*arguments) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export("--n", "0")
    assert "'0' is not a whole number from 1" in capsys.readouterr().err


def test_identical_systems_have_no_ballot_and_do_not_block_the_others(
    project: Path, ballot: Match, capsys: Any
) -> None:
    records = [record(i) for i in range(ANSWERS)]
    twin = [
        Answer("Weak 1.") if i == 1 else None for i in range(ANSWERS)
    ]  # of one prompt, and as `few_shot` answers it
    rows = result_rows("twin", records, None, twin)
    other = [{**row, "system": "other", "answer": "x", "example_id": "of an earlier split"} for row in rows[:1]]
    write_table(project / "data/evaluation/twin/results.parquet", rows + other, result_schema())
    for systems, same in ((("few_shot", "twin"), 1), (("lora", "other"), 0)):
        assert main(["ballots", "export", *systems, "--project", str(project)]) == 2
        assert f"no test prompt with two different answers ({same} with the same answer)" in capsys.readouterr().err
    assert (
        ballots.read_votes(project, [Path(*saved(project, sheet(ballot, "Anna", lambda i, pair: "win")))], 7, False)[0]
        == ballot
    )


@pytest.mark.parametrize("left", ["adapter: {other: {}}\naligned:\n", "aligned: {lora: {}}\n", "", "adapter: 3\n"])
def test_the_answers_of_a_variant_that_was_removed_do_not_count(project: Path, left: str, capsys: Any) -> None:
    assert (
        main(["ballots", "export", "few_shot", "lora", "--project", str(project), "--out", str(project / "a.html")])
        == 0
    )
    (project / "params.yaml").write_text(f"compute: {{seed: 7}}\n{left}")
    capsys.readouterr()
    assert main(["ballots", "export", "few_shot", "lora", "--project", str(project)]) == 2
    assert "lora" in (said := capsys.readouterr().err).splitlines()[0] and "Traceback" not in said


def test_without_answers_the_error_names_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="dvc repro comparison`; it asks for answers to test examples with a prompt and a response"
    ):
        match(tmp_path, ("lora", "few_shot"), seed=7)
    with pytest.raises(InputError, match="no system has answered"):
        contenders(tmp_path)


def test_without_the_test_split_the_error_names_the_next_step(project: Path) -> None:
    shutil.rmtree(project / "data/splits/test")
    with pytest.raises(InputError, match=r"no test examples\n.*dvc checkout data/splits"):
        match(project, ("lora", "few_shot"), seed=7)


def test_a_damaged_comparison_is_one_message(project: Path) -> None:
    (project / "data/comparison/comparison.json").write_text('{"compared": ')
    with pytest.raises(InputError, match=r"comparison\.json cannot be read: .*\n.*dvc repro comparison"):
        contenders(project)


NAME = "data/comparison/comparison.json"
GAIN = {"macro_f1": {"difference": 0.5}}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({}, "compared is missing"),
        ({"compared": []}, "compared is not an object"),
        ({"compared": "lora"}, "compared is not an object"),
        ({"compared": {"lora": None}}, "compared.lora is missing"),
        ({"compared": {"lora": {"to": ["few_shot"]}}}, "compared.lora.to is not an object"),
        ({"compared": {"lora": {"to": {"few_shot": 0.5}}}}, "compared.lora.to.few_shot is not an object"),
        ({"compared": {"lora": {"to": {"few_shot": {}}}}}, "compared.lora.to.few_shot has no measure"),
        ({"compared": {"lora": {"to": {"few_shot": {"macro_f1": 1}}}}}, "few_shot.macro_f1 is not an object"),
        *(
            ({"compared": {"lora": {"to": {"few_shot": {"macro_f1": wrong}}}}}, "difference is not a number")
            for wrong in ({"gain": 1}, {"difference": "1"}, {"difference": None}, {"difference": True})
        ),
        ({"compared": {"lora": {"to": {"few_shot": {"a": {"difference": float("nan")}}}}}}, "is not a number"),
    ],
)
@pytest.mark.parametrize("command", [["ballots", "export"], ["judge", "--endpoint", "http://localhost:9/v1"]])
def test_a_comparison_of_another_shape_is_one_message(
    project: Path, command: list[str], document: Any, said: str, capsys: Any
) -> None:
    (project / NAME).write_text(json.dumps(document))
    model = ["--model", "m"] if command[0] == "judge" else []
    assert main([*command, *model, *at(project)]) == 2
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {NAME} cannot be read: it is not a comparison") and said in first
    assert others == [
        "hint: restore it with `dvc checkout --force data/comparison`, or make it again with `dvc repro comparison`"
    ]


def test_a_variant_without_answers_does_not_prevent_a_ballot_on_the_others(project: Path) -> None:
    likelihoods = {"perplexity_to_base": {"ratio": 0.5, "interval": [0.4, 0.6]}}
    write_json(project / NAME, {"compared": {"a": likelihoods, "lora": {"to": {"few_shot": GAIN}}}})
    assert contenders(project) == ("lora", "few_shot")


def test_a_difference_that_no_float_can_hold_is_a_number(project: Path) -> None:
    write_json(project / NAME, {"compared": {"lora": {"to": {"few_shot": {"custom.size": {"difference": 10**400}}}}}})
    assert contenders(project) == ("lora", "few_shot")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_a_file_in_another_encoding_is_read(project: Path, ballot: Match, encoding: str, capsys: Any) -> None:
    text = json.dumps(sheet(ballot, "Zoë", lambda i, pair: "win"), ensure_ascii=False)
    (project / "votes.json").write_text(text.replace("}", "}\r\n"), encoding=encoding)
    assert main(["ballots", "import", str(project / "votes.json"), "--json", *at(project)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["raters"], found["wins"]) == ({"Zoë": 18}, 18)


@pytest.mark.parametrize(
    "other", ["anna", " ANNA ", "\u00a0Anna\t", "\uff21nna", "Anna\u200b", "\ufeffAnna", "An\u00adna"]
)
def test_spellings_of_one_name_are_one_rater(project: Path, ballot: Match, other: str, capsys: Any) -> None:
    files = saved(project, *(sheet(ballot, name, lambda i, pair: "win") for name in ("Anna", "Ben", other)))
    err = refused(project, files, capsys=capsys)
    assert f"{files[0]}, {files[2]}: all by rater 'Anna'" in err and "give one file for each rater" in err
    assert ("case, spaces at the ends and repeated spaces are ignored" in err) == (other.strip() != "Anna")


@pytest.mark.parametrize("name", ["Anna B", "Annä", "Ana"])
def test_other_names_are_other_raters(project: Path, ballot: Match, name: str, capsys: Any) -> None:
    files = saved(project, *(sheet(ballot, one, lambda i, pair: "win") for one in ("Anna", f" {name} ")))
    assert main(["ballots", "import", *files, "--json", *at(project)]) == 0
    assert json.loads(capsys.readouterr().out)["raters"] == {"Anna": 18, name: 18}


def test_a_file_that_states_another_number_of_pairs_than_its_page_is_refused(
    project: Path, ballot: Match, capsys: Any
) -> None:
    """Of 18 votes, the last 8 are deleted, and the file says that there were 10."""
    whole = sheet(ballot, "Anna", lambda i, pair: "win" if i < 10 else "loss")
    short = whole | {"votes": whole["votes"][:10], "pairs": 10}
    for options in ([], ["--partial"]):
        err = refused(project, saved(project, short), *options, capsys=capsys)
        assert "votes-0.json: states 10 pairs, which is not the number on its page" in err
    assert "states 10 pairs" in refused(project, saved(project, short | {"seal": "0"}), capsys=capsys)
    assert "states 19 pairs" in refused(project, saved(project, whole | {"pairs": 19}), "--partial", capsys=capsys)
    assert (
        main(["ballots", "import", *saved(project, sheet(ballot, "Anna", lambda i, pair: "win", 10)), *at(project)])
        == 0
    )
    assert "cannot be checked" not in capsys.readouterr().err


@pytest.mark.parametrize("seal", [{}, {"seal": None}])
def test_a_file_without_its_code_counts_as_incomplete(
    project: Path, ballot: Match, seal: dict[str, None], capsys: Any
) -> None:
    """A rater deletes the code, and the last votes: nothing shows how many there were."""
    sealed = sheet(ballot, "Anna", lambda i, pair: "loss" if i == 4 else "win")
    whole = {name: value for name, value in sealed.items() if name != "seal"} | seal
    other = sheet(ballot, "Ben", lambda i, pair: "win")
    short = whole | {"votes": whole["votes"][:4], "pairs": 4}
    for votes in (whole, short):
        files = saved(project, votes, other)
        err = refused(project, files, capsys=capsys)
        assert f"{files[0]}: without the code" in err and files[1] not in err and "--partial" in err
        assert main(["ballots", "import", *files, "--partial", "--json", *at(project)]) == 0
        shown = capsys.readouterr()
        assert f"{files[0]}: saved from a page of an earlier version, or edited" in shown.err
        assert json.loads(shown.out)["raters"] == {"Anna": len(votes["votes"]), "Ben": 18}
    without_loss = [vote for i, vote in enumerate(whole["votes"]) if i != 4]
    files = saved(project, whole | {"votes": without_loss, "pairs": 17})
    err = refused(project, files, "--partial", capsys=capsys)
    assert "votes on pairs that a page with 17 pairs does not have" in err


def test_votes_are_not_replaced_by_preferences(project: Path, ballot: Match, capsys: Any) -> None:
    [votes] = saved(project, sheet(ballot, "Anna", lambda i, pair: "win"))
    before = Path(votes).read_bytes()
    assert main(["ballots", "import", votes, "--preferences", votes, "--project", str(project)]) == 2
    assert "a file of votes, which it would replace" in capsys.readouterr().err and Path(votes).read_bytes() == before


LOCK = """\
schema: '2.0'
stages:
  raw_preferences:
    cmd: a
    deps: [{path: data/sources, md5: 0123.dir}]
    outs: [{path: data/raw_preferences, md5: 4567.dir}]
"""


@pytest.mark.parametrize(
    ("file", "refused"),
    [
        ("data/raw_preferences/records-00000.jsonl", "lies in data/raw_preferences, an output of raw_preferences"),
        ("data/sources/pairs.jsonl", "lies in data/sources, which raw_preferences reads"),
        ("params.yaml", "is params.yaml"),
        ("dvc.lock", "is dvc.lock"),
        ("data/sources/new.jsonl", ""),
    ],
)
def test_preferences_replace_no_data_and_no_file_of_the_pipeline(
    project: Path, ballot: Match, capsys: Any, file: str, refused: str
) -> None:
    (project / "dvc.lock").write_text(LOCK)
    (project / "data/sources").mkdir()
    (project / "data/sources/pairs.jsonl").write_text("written by people\n")
    votes = saved(project, sheet(ballot, "Anna", lambda i, pair: "win"))
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    code = main(["ballots", "import", *votes, "--preferences", str(project / file), "--project", str(project)])
    after = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    if refused:
        assert code == 2 and refused in capsys.readouterr().err and after == before
    else:
        assert code == 0 and after.keys() - before.keys() == {project / file}


@pytest.mark.parametrize("content", [b"", b"PAR1 cut short", b"PAR1" + b"\0" * 90 + b"PAR1"])
@pytest.mark.parametrize("table", ["data/evaluation/lora/results.parquet", "data/splits/test/records-00000.parquet"])
def test_a_damaged_table_is_one_message(project: Path, table: str, content: bytes, capsys: Any) -> None:
    (project / table).write_bytes(content)
    assert main(["ballots", "export", "lora", "few_shot", "--project", str(project)]) == 2
    assert (
        f"error: {table} is damaged: " in (shown := capsys.readouterr().err)
        and f"`dvc checkout --force {table}` restores it" in shown
    )


@pytest.mark.parametrize(
    ("table", "column"),
    [
        ("data/baselines/results.parquet", "system"),
        ("data/evaluation/lora/results.parquet", "answer"),
        ("data/splits/test/records-00000.parquet", "messages"),
    ],
)
def test_a_table_without_a_column_is_one_message(project: Path, table: str, column: str, capsys: Any) -> None:
    import polars as pl

    pl.read_parquet(project / table).drop(column).write_parquet(project / table)
    assert main(["ballots", "export", "lora", "few_shot", *at(project)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {table} is damaged: it has no column {column}",
        f"hint: `dvc checkout --force {table}` restores it; if another version of Pedigree wrote it,"
        " `dvc repro` makes it again",
    ]


@pytest.mark.browser
@needs_chromium
def test_votes_by_keyboard_survive_a_closed_browser_tab(project: Path, ballot: Match, capsys: Any) -> None:
    from playwright.sync_api import sync_playwright

    page = project / "ballot.html"
    page.write_text(ballot_page(ballots.document(ballot, 4)), encoding="utf-8")
    seen: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(
            viewport={"width": 420, "height": 800}, color_scheme="dark", accept_downloads=True
        )

        def opened() -> Any:
            tab = context.new_page()
            tab.on("console", lambda message: seen.append(message.text))
            tab.on("pageerror", lambda error: seen.append(str(error)))
            tab.on("dialog", lambda dialog: seen.append(dialog.message))
            tab.on(
                "request",
                lambda request: (
                    seen.append(request.url) if not request.url.startswith((page.as_uri(), "blob:")) else None
                ),
            )
            tab.goto(page.as_uri())
            return tab

        tab = opened()
        hits, pressed = tab.locator("#hits"), tab.locator("[aria-pressed=true]")
        assert hits.inner_text() == "Pair 1 of 4 · 0 voted, 4 to go" and tab.locator("#back").is_disabled()
        shown = tab.locator(".side bdi")
        assert shown.evaluate_all("all => all.map(one => one.textContent)") == [
            visible(answer) for answer in ballot.pairs[0].shown
        ]
        assert tab.evaluate("document.documentElement.scrollWidth") <= 420 and tab.locator("main img").count() == 0
        tab.keyboard.press("a")
        tab.keyboard.press("t")
        assert hits.inner_text() == "Pair 3 of 4 · 2 voted, 2 to go"
        tab.keyboard.press("ArrowLeft")
        assert pressed.inner_text() == "✓ Tie"
        tab.keyboard.press("b")  # changes the vote on the second pair
        tab.close()

        tab = opened()
        hits, pressed = tab.locator("#hits"), tab.locator("[aria-pressed=true]")
        assert hits.inner_text() == "Pair 3 of 4 · 2 voted, 2 to go"
        tab.keyboard.press("ArrowLeft")
        assert pressed.inner_text() == "✓ B is better"
        tab.keyboard.press("ArrowRight")
        for _ in range(
            3
        ):  # from the progress line over `Back` and `Next`: every control can be reached and its focus is seen
            tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.dataset.vote") == "a"
        assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        tab.keyboard.press("Enter")
        tab.keyboard.press("t")
        assert hits.inner_text() == "Pair 4 of 4 · all voted: save below"
        assert tab.evaluate("document.activeElement.id") == "rater"  # the next step
        tab.keyboard.press("Enter")
        assert tab.locator("#saved").inner_text() == "Give your name or initials first."
        tab.keyboard.type("A. b/t")
        with tab.expect_download() as download:
            tab.keyboard.press("Enter")
        assert download.value.suggested_filename == f"votes-{ballot.id}-A_b_t.json"
        download.value.save_as(project / "votes.json")
        browser.close()
    assert seen == []
    assert [vote["vote"] for vote in json.loads((project / "votes.json").read_text())["votes"]] == [
        "a",
        "b",
        "a",
        "tie",
    ]
    assert main(["ballots", "import", str(project / "votes.json"), "--json", "--project", str(project)]) == 0
    found = json.loads(capsys.readouterr().out)
    wins = sum(
        pair.shown["ab".index(said)].startswith("Strong") for pair, said in zip(ballot.pairs, "aba", strict=False)
    )
    assert (found["raters"], found["wins"], found["ties"], found["losses"]) == ({"A. b/t": 4}, wins, 1, 3 - wins)


@pytest.mark.browser
@needs_chromium
def test_a_page_with_fewer_pairs_of_a_ballot_keeps_the_votes_on_the_others(project: Path, ballot: Match) -> None:
    from playwright.sync_api import sync_playwright

    page = project / "ballot.html"

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context()

        def opened(n: int) -> Any:
            page.write_text(ballot_page(ballots.document(ballot, n)), encoding="utf-8")
            tab = context.new_page()
            tab.goto(page.as_uri())
            return tab

        for key in "abt":
            opened(4).keyboard.press(key)
        assert opened(4).locator("#hits").inner_text() == "Pair 4 of 4 · 3 voted, 1 to go"
        few = opened(2)
        assert few.locator("#hits").inner_text() == "Pair 2 of 2 · all voted: save below"
        few.locator("#rater").fill("Anna")
        with few.expect_download() as download:
            few.locator("#download").click()
        download.value.save_as(project / "votes.json")
        assert opened(4).locator("#hits").inner_text() == "Pair 4 of 4 · 3 voted, 1 to go"
        browser.close()
    first, second = (pair.id for pair in ballot.pairs[:2])
    votes = [{"pair": first, "vote": "a"}, {"pair": second, "vote": "b"}]
    file = json.loads((project / "votes.json").read_text())
    assert file == {"ballot": ballot.id, "pairs": 2, "seal": ballot.seal(2), "rater": "Anna", "votes": votes}


@pytest.mark.browser
@needs_chromium
def test_two_tabs_of_a_ballot_keep_the_votes_of_both(project: Path, ballot: Match) -> None:
    from playwright.sync_api import sync_playwright

    page = project / "ballot.html"
    page.write_text(ballot_page(ballots.document(ballot, 4)), encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context()
        first, second = context.new_page(), context.new_page()
        for tab in (first, second):
            tab.goto(page.as_uri())
        first.keyboard.press("a")
        first.keyboard.press("b")
        second.keyboard.press("ArrowRight")
        second.keyboard.press("ArrowRight")
        second.keyboard.press("t")
        assert second.locator("#hits").inner_text() == "Pair 4 of 4 · 3 voted, 1 to go"
        first.keyboard.press("ArrowLeft")
        first.keyboard.press("t")  # changes the vote on the second pair
        first.locator("#rater").fill("Anna")
        with first.expect_download() as download:
            first.locator("#download").click()
        download.value.save_as(project / "votes.json")
        browser.close()
    votes = [vote["vote"] for vote in json.loads((project / "votes.json").read_text())["votes"]]
    assert votes == ["a", "tie", "tie"]
