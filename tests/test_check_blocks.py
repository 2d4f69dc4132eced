"""The checks give the same answer in blocks of any size, on any number of processes."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from builders.rows_of_all_kinds import answer, sample
from builders.tiny_model import CHAT_TEMPLATE

from dagster_project.core import workers
from dagster_project.curation.checks.checks import Rules, judge
from dagster_project.curation.checks.token_counts import ESTIMATED, tokens_of


@pytest.mark.parametrize("pairs", [False, True], ids=["examples", "pairs"])
@pytest.mark.parametrize("seed", range(2))
def test_blocks_of_any_size_give_the_same_answer(
    seed: int, pairs: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, tokens = sample(seed, 80, pairs), tokens_of(tiny_model) if seed else ESTIMATED
    whole = answer(rows, tokens, pairs)
    assert all(f'"{check}"' in whole for check in ("exact_duplicates", "hidden_characters", "pii", "missing_reasoning"))
    for size in (19, 79):
        monkeypatch.setattr("dagster_project.core.stored_rows.BLOCK", size)
        assert answer(rows, tokens, pairs) == whole


@pytest.mark.long
def test_several_processes_give_the_same_answer(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tokens = sample(5, 80), tokens_of(tiny_model)
    whole = answer(rows, tokens, False)
    monkeypatch.setattr("dagster_project.core.stored_rows.BLOCK", 30)
    with workers.using(workers.LocalProcesses(2)):
        assert answer(rows, tokens, False) == whole


def test_the_result_of_a_set_without_rows_is_that_of_no_rows() -> None:
    judged = judge([], [], Rules())
    assert not judged.verdicts["schema"].passed and [*judged.records] == [] and judged.reason == []


def test_a_tokenizer_in_another_process_knows_the_models_end_tokens(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    template = CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>")
    for path in folder.glob("chat_template*"):
        path.unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}]
    misfit = tokens_of(folder).misfit
    assert misfit and "does not end" in str(misfit(messages, None))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    here = tokens_of(folder)
    for tokens in (
        here,
        pickle.loads(pickle.dumps(here)),
        pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(here)))),
    ):
        assert tokens.misfit(messages, None) is None
        assert (tokens.count(["Ann."]), tokens.special) == (here.count(["Ann."]), here.special)
