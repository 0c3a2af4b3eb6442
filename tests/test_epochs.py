import json
import math

from test_pipeline import stopped_after
from tiny_run import write_base, write_recipe

from deepen.cli import main
from deepen.config import load_recipe
from deepen.pipeline.run import run_recipe


def test_epochs_of_a_mixture_are_counted_to_the_window_over_a_resume(tmp_path, capsys, monkeypatch):
    write_base(tmp_path / "base")
    sources = [
        {"path": str(tmp_path / "train.jsonl"), "weight": 0.4},
        {"path": str(tmp_path / "general.jsonl"), "weight": 0.25, "name": "rest"},
    ]
    path = write_recipe(tmp_path, train__tokens=None, train__epochs=1.5, data__sources=sources)
    assert main(["run", str(path), "--dry-run"]) == 0
    assert "epochs      1.5, in steps of 4 windows" in capsys.readouterr().out
    assert main(["data", "prepare", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    per_epoch = [source["windows_per_epoch"] for source in facts["sources"]]
    sizes = [source["packing"]["windows"] for source in facts["sources"]]
    assert per_epoch == [round(0.4 * sizes[0]), round(0.25 * sizes[1])]
    steps = math.ceil(1.5 * sum(per_epoch) / 4)

    stopped_after(3, load_recipe(path), monkeypatch)
    result = run_recipe(load_recipe(path), resume=True)
    assert (result.steps, facts["steps"]) == (steps, steps)
    assert result.tokens == steps * 128
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    assert last["epochs"] == steps * 4 / sum(per_epoch)
    seen = [
        round(last["source_epochs"][name] * size) for name, size in zip(("train", "rest"), sizes, strict=True)
    ]
    assert [windows * 32 for windows in seen] == [last["source_tokens"][name] for name in ("train", "rest")]
    assert sum(seen) == steps * 4
    # Whole epochs hold exactly their windows; the part of one that follows at most as many.
    assert all(one <= windows <= 2 * one for windows, one in zip(seen, per_epoch, strict=True))
    assert "epochs)" in (tmp_path / "run" / "report.html").read_text().replace("\xa0", " ")
