"""Plots of runs show what was recorded, tell runs apart, and report damage."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
from support.pictures import (
    BYTES_PER_TOKEN,
    close,
    is_png,
    legend,
    metrics,
    points,
    saved_figures,
    write_run,
)
from support.runs import full_disk

import tinyllm.tools.plot
from tinyllm.errors import Error
from tinyllm.tools.plot import new_figure, plot_runs, show, summary
from tinyllm.training.metrics import read_run


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    return saved_figures(monkeypatch)


def test_without_matplotlib_only_the_summary_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = write_run(tmp_path / "run")
    with pytest.raises(Error, match="matplotlib"):
        plot_runs([run], tmp_path / "runs.png")
    assert "2.5000" in summary([run])


def test_two_runs_in_one_plot(tmp_path, figures):
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", metrics((5.0, 4.0, 3.0)), dropout=0.2, stride=64)
    plot_runs([one, str(two)], tmp_path / "runs.png")
    assert is_png(tmp_path / "runs.png")
    axes = figures[0].axes[0]
    train_1, val_1, best_1, train_2, val_2, best_2 = axes.lines
    close(points(train_1), [(0, 4.5), (10, 2.5), (20, 1.5), (30, 2.0)])
    close(points(val_1), [(0, 5.0), (10, 3.0), (20, 2.0), (30, 2.5)])
    close(points(best_1), [(20, 2.0)])
    close(points(train_2), [(0, 4.5), (10, 3.5), (20, 2.5)])
    close(points(val_2), [(0, 5.0), (10, 4.0), (20, 3.0)])
    close(points(best_2), [(20, 3.0)])
    assert (
        len({line.get_color() for line in axes.lines[:3]})
        == len({line.get_color() for line in axes.lines[3:]})
        == 1
    )
    assert val_1.get_color() != val_2.get_color()
    assert (train_1.get_linestyle(), val_1.get_linestyle()) == ("--", "-")
    assert legend(figures[0]) == ["one: dropout=0.1, stride not given", "two: dropout=0.2, stride=64"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss (nats per token)")


def test_axes_of_tokens_time_and_bits_per_byte(tmp_path, figures):
    run = write_run(tmp_path / "run", metrics(tokens_per_s=20.0))  # 50 tokens a step: 2.5 s
    nats = math.log(2) * BYTES_PER_TOKEN
    plot_runs([run], tmp_path / "a.png", x="tokens", y="bits-per-byte")
    close(
        points(figures[0].axes[0].lines[0]),
        [(0, 4.5 / nats), (500, 2.5 / nats), (1000, 1.5 / nats), (1500, 2 / nats)],
    )
    close(
        points(figures[0].axes[0].lines[1]),
        [(0, 5 / nats), (500, 3 / nats), (1000, 2 / nats), (1500, 2.5 / nats)],
    )
    assert figures[0].axes[0].get_ylabel() == "bits per byte"
    plot_runs([run], tmp_path / "b.pdf", x="time")
    close(points(figures[1].axes[0].lines[1]), [(0, 5), (25, 3), (50, 2), (75, 2.5)])
    assert figures[1].axes[0].get_xlabel() == "training time (s, without evaluations)"
    slow = write_run(tmp_path / "slow", metrics(tokens_per_s=5.0))  # 10 s a step
    plot_runs([run, slow], tmp_path / "c.svg", x="time")
    close(points(figures[2].axes[0].lines[1]), [(0, 5), (25 / 60, 3), (50 / 60, 2), (75 / 60, 2.5)])
    close(points(figures[2].axes[0].lines[4]), [(0, 5), (100 / 60, 3), (200 / 60, 2), (300 / 60, 2.5)])
    assert figures[2].axes[0].get_xlabel() == "training time (min, without evaluations)"
    slower = write_run(tmp_path / "slower", metrics(tokens_per_s=0.1))
    plot_runs([slower], tmp_path / "d.png", x="time")
    close(points(figures[3].axes[0].lines[2]), [(20 * 500 / 3600, 2)])


def test_time_follows_a_changing_speed(tmp_path):
    records = metrics((5.0, 4.0), every=2)
    records[1]["tokens_per_s"], records[2]["tokens_per_s"] = 50.0, 10.0
    assert read_run(write_run(tmp_path / "run", records)).along("time") == [0, 1, 6]


def test_different_tokenizers_compare_only_in_bits_per_byte(tmp_path, figures):
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", tokenizer="abcd")]
    with pytest.raises(Error, match=r"tokenizers differ.*bits-per-byte"):
        plot_runs(runs, tmp_path / "runs.png")
    assert not figures
    plot_runs(runs, tmp_path / "runs.png", y="bits-per-byte")
    assert is_png(tmp_path / "runs.png")
    assert "the tokenizers differ" in summary(runs)
    assert "the tokenizers differ" not in summary(runs[:1])


def test_losses_per_pair_are_not_compared_with_those_per_token(tmp_path, figures):
    dpo, instruct = (write_run(tmp_path / task, task=task) for task in ("dpo", "instruct"))
    with pytest.raises(Error, match="losses are per pair and per token"):
        plot_runs([dpo, instruct], tmp_path / "runs.png")
    for run, unit in (
        (dpo, "pair"),
        (instruct, "token"),
        (write_run(tmp_path / "c", task="classify"), "text"),
    ):
        plot_runs([run], tmp_path / "runs.png")
        assert figures[-1].axes[0].get_ylabel() == f"loss (nats per {unit})"


def test_an_older_run_without_bits_per_byte(tmp_path):
    pytest.importorskip("matplotlib")
    records = [
        {k: v for k, v in r.items() if k not in ("val_bits_per_byte", "train_eval_loss")} for r in metrics()
    ]
    run = write_run(tmp_path / "old", records)
    plot_runs([run], tmp_path / "runs.png")
    with pytest.raises(Error, match="run old has no val_bits_per_byte"):
        plot_runs([run], tmp_path / "runs.png", y="bits-per-byte")
    assert summary([run]).splitlines()[1].split() == "old 30 1,500 0:15 – 2.5000 2.0000 20 – –".split()


def test_the_legend_lists_the_options_that_differ(tmp_path, figures):
    many = {f"option_{i}": i for i in range(7)}
    runs = [
        write_run(tmp_path / "_a" / "run", prompt="costs $\\x$\nmore"),
        write_run(tmp_path / "_b" / "run", **many, prompt="costs $x_2"),
        write_run(tmp_path / "_c", prompt="the"),
    ]
    plot_runs(runs, tmp_path / "runs.png")
    names = [" ".join(line.split()) for line in legend(figures[0])]
    assert names[0].startswith(f"{runs[0]}: prompt=costs $\\x$ more, option_0 not given")
    assert names[1].startswith(f"{runs[1]}: prompt=costs $x_2, option_0=0, option_1=1")
    assert names[2].startswith("_c: prompt=the")
    assert all(name.endswith("and 3 more options") for name in names)
    assert "option_6=6" in summary(runs)


def test_different_texts_are_listed(tmp_path):
    same = [write_run(tmp_path / "a"), write_run(tmp_path / "b", sha256="abcdefghij")]
    assert "a: text_sha256=12345678\nb: text_sha256=abcdefgh" in summary(same)
    other = [same[0], write_run(tmp_path / "c", sha256="abcdefghij", text="other.txt")]
    assert "a: text=rhyme.txt\nc: text=other.txt" in summary(other)
    copy = [same[0], write_run(tmp_path / "d", text="copy.txt")]
    assert "a: text=rhyme.txt\nd: text=copy.txt" in summary(copy)


def test_summary_is_a_table_of_88_columns(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "longer", metrics((5.0, 4.0), tokens_per_s=4.0))]
    lines = summary(runs).splitlines()
    bits = {loss: f"{loss / math.log(2) / BYTES_PER_TOKEN:.3f}" for loss in (2.0, 2.5, 4.0)}
    assert lines[0].split() == "run step tokens time train val best val at bits/byte best".split()
    assert lines[1].split() == [
        "a",
        "30",
        "1,500",
        "0:15",
        "2.0000",
        "2.5000",
        "2.0000",
        "20",
        bits[2.5],
        bits[2.0],
    ]
    assert lines[2].split() == [
        "longer",
        "10",
        "500",
        "2:05",
        "3.5000",
        "4.0000",
        "4.0000",
        "10",
        bits[4.0],
        bits[4.0],
    ]
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    long = write_run(tmp_path / ("a-run-with-a-long-name-" + 40 * "x"), metrics((5.0, 4.0)))
    lines = summary([runs[0], long]).splitlines()
    assert [line.split()[0] for line in lines] == ["run", "step", "a", "30", long.name, "10"]
    assert max(map(len, lines)) <= 88


# Damage


def test_a_truncated_last_line_is_reported(tmp_path):
    run = write_run(tmp_path / "run", end='{"step": 31, "tok')
    assert read_run(run).records == metrics()
    assert "run: the last line of metrics.jsonl, number 32, is half-written and was skipped" in summary([run])
    whole = write_run(tmp_path / "whole", end=json.dumps({"step": 31, "tokens": 1550, "tokens_per_s": 1.0}))
    assert read_run(whole).records[-1]["step"] == 31  # only its newline is missing
    assert not read_run(whole).notes
    assert "half-written" not in summary([whole])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"step": 31, "tok', "not a JSON object"),
        ("", "not a JSON object"),
        ("[1, 2]", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('{"tokens": 1550}', "it has no step"),
        ('{"step": 31}', "it has no tokens"),
        ('{"step": 30, "tokens": 1500}', "step 30 follows step 30"),
        ('{"step": 31, "tokens": 1499}', "1499 tokens follow 1500"),
        ('{"step": 31, "tokens": 1550}', "tokens_per_s is missing or not above 0"),
        ('{"step": 31, "tokens": 1550, "tokens_per_s": 0}', "tokens_per_s is missing or not above 0"),
        ('{"step": 31, "tokens": 1500, "val_loss": NaN}', "val_loss is NaN, not a finite number"),
        ('{"step": 31, "tokens": 1500, "val_loss": "low"}', 'val_loss is "low", not a finite number'),
        ('{"step": true, "tokens": 1500}', "step is true, not a finite number"),
        ('{"step": 31, "tokens": 1500, "val_loss": 1' + "0" * 400 + "}", "not a finite number"),
    ],
)
def test_a_damaged_line_is_refused_with_its_number(tmp_path, line, said):
    run = write_run(tmp_path / "run", end=line + "\n")
    with pytest.raises(Error, match="line 32, is damaged") as refusal:
        read_run(run)
    assert said in str(refusal.value)
    assert str(run / "metrics.jsonl") in str(refusal.value)


def test_other_folders_are_refused(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(Error, match=r"is not a run folder \(it has no readable config\.json"):
            read_run(path)
    run = write_run(tmp_path / "run")
    for file in ("config.json", "tinyllm_tokenizer.json"):
        whole = (run / file).read_bytes()
        (run / file).write_bytes(whole[:-3])
        with pytest.raises(Error, match=f"its {file} is damaged"):
            read_run(run)
        (run / file).write_bytes(whole)
    for about in ("[]", "{}", '{"train": {}, "text": {}}', '{"train": [], "text": {"sha256": "a"}}'):
        (run / "config.json").write_text(about, encoding="utf-8")
        with pytest.raises(Error, match="was not written by tinyllm train"):
            read_run(run)


def test_runs_without_an_evaluation_are_refused(tmp_path):
    empty = write_run(tmp_path / "empty", [])
    started = write_run(tmp_path / "started", [], end='{"step": 0, "to')
    silent = write_run(tmp_path / "silent", [{"step": 0, "tokens": 0}])
    absent = write_run(tmp_path / "absent")
    (absent / "metrics.jsonl").unlink()
    for run in (empty, started, silent, absent):
        with pytest.raises(Error, match="has no evaluation in metrics"):
            summary([run])
    (absent / "metrics.jsonl").mkdir()
    with pytest.raises(Error, match="cannot be read"):
        read_run(absent)


def test_wrong_requests_are_refused(tmp_path):
    pytest.importorskip("matplotlib")
    run, out = write_run(tmp_path / "run"), tmp_path / "runs.png"
    with pytest.raises(Error, match="x is 'epoch': choose step or tokens or time"):
        plot_runs([run], out, x="epoch")
    with pytest.raises(Error, match="y is 'bits': choose loss or bits-per-byte"):
        plot_runs([run], out, y="bits")
    for name in ("runs", "runs.xls", ".png"):
        with pytest.raises(Error, match=r"must end in \.png, \.svg, \.pdf"):
            plot_runs([run], tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "missing" / "runs.png", tmp_path / "folder.png"):
        with pytest.raises(Error, match="cannot be written"):
            plot_runs([run], path)
    for runs in ([], run, str(run)):
        with pytest.raises(Error, match="give a list of at least one run folder"):
            plot_runs(runs, out)
    most = len(tinyllm.tools.plot.COLORS)
    runs = [write_run(tmp_path / f"run-{n}") for n in range(most + 1)]
    with pytest.raises(Error, match=f"{most + 1} runs, too many for one plot: give at most {most}"):
        plot_runs(runs, out)
    assert not out.exists()
    plot_runs(runs[:most], out)
    assert is_png(out)


def test_a_full_disk_keeps_the_plot_of_before(tmp_path):
    pytest.importorskip("matplotlib")
    run, out = write_run(tmp_path / "run"), tmp_path / "runs.png"
    out.write_bytes(b"before")
    with full_disk(1000), pytest.raises(Error, match=r"runs\.png cannot be written \(File too large"):
        plot_runs([run], out)
    assert out.read_bytes() == b"before"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "runs.png"}


def test_a_run_that_is_given_twice_is_refused(tmp_path):
    run = write_run(tmp_path / "one")
    with pytest.raises(Error, match="one is given more than once"):
        plot_runs([run, f"{run}/../one"], tmp_path / "runs.png")


def test_the_start_of_a_run_is_shown_as_its_option(tmp_path):
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", start_from="one")]
    assert summary(runs).splitlines()[-2:] == ["one: --from not given", "two: --from=one"]


def test_show_saves_a_figure_and_prints_where(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    figure, _ = new_figure(2, 2)
    show("runs/new/picture.png", figure)
    assert is_png(tmp_path / "runs/new/picture.png")
    assert capsys.readouterr().out == "picture: runs/new/picture.png\n"


def test_show_displays_a_picture_in_a_notebook(tmp_path, monkeypatch, figures):
    displayed = []
    fake = SimpleNamespace(display=displayed.append, Image=lambda filename: filename)
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=fake))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    show(tmp_path / "there.png")
    assert displayed == [str(tmp_path / "there.png")] and not figures


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege")
def test_a_link_to_itself_is_not_a_run(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for call in (summary, lambda runs: plot_runs(runs, tmp_path / "runs.png")):
        with pytest.raises(Error, match="is not a run folder"):
            call([tmp_path / "loop"])
