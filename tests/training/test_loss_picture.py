"""The picture of a run's losses has the recorded curves, and needs no display."""

import math
import subprocess
import sys

import pytest
from support.pictures import BYTES_PER_TOKEN, is_png, legend, metrics, points, saved_figures

from tinyllm.training.picture import plot_losses


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    return saved_figures(monkeypatch)


def test_the_picture_has_all_losses_the_best_and_guessing(tmp_path, figures):
    history = metrics()
    plot_losses(history, tmp_path / "loss.png", vocab_size=150, bytes_per_token=BYTES_PER_TOKEN)
    assert is_png(tmp_path / "loss.png")
    axes = figures[0].axes[0]
    batch, train, validation, best, guessing = axes.lines
    assert points(batch) == [(r["step"], r["train_loss"]) for r in history[1:]]
    assert points(train) == [(0, 4.5), (10, 2.5), (20, 1.5), (30, 2.0)]
    assert points(validation) == [(0, 5.0), (10, 3.0), (20, 2.0), (30, 2.5)]
    assert points(best) == [(20, 2.0)]
    assert set(guessing.get_ydata()) == {math.log(150)}
    assert [text.get_text() for text in axes.texts] == ["ln V: guessing"]
    assert axes.texts[0].xy == (1, math.log(150))
    assert batch.get_alpha() < 0.5
    assert train.get_marker() == validation.get_marker() == "o"
    assert train.get_color() == batch.get_color() != validation.get_color() == best.get_color()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss (nats per token)")
    bits = 2.0 / math.log(2) / BYTES_PER_TOKEN
    assert f"best: 2.000 ({bits:.3f} bits per byte) at step 20" in legend(figures[0])


def test_the_second_axis_has_bits_per_byte(tmp_path, figures):
    plot_losses(metrics(), tmp_path / "loss.png", bytes_per_token=BYTES_PER_TOKEN)
    axes = figures[0].axes[0]
    (right,) = axes.child_axes
    assert right.get_ylabel() == "bits per byte"
    expected = [loss / math.log(2) / BYTES_PER_TOKEN for loss in axes.get_ylim()]
    assert list(right.get_ylim()) == pytest.approx(expected)


def test_missing_quantities_are_not_plotted(tmp_path, figures):
    plot_losses(metrics(), tmp_path / "loss.png")
    axes = figures[0].axes[0]
    assert not axes.texts and not axes.child_axes
    assert "best: 2.000 at step 20" in legend(figures[0])
    plot_losses(metrics()[1:10], tmp_path / "loss.png")  # before any evaluation
    assert len(figures[1].axes[0].lines) == 1
    plot_losses(metrics()[:1], tmp_path / "loss.png")  # before any step
    assert len(figures[2].axes[0].lines) == 3


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plot_losses(metrics(), tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_a_picture_that_cannot_be_written_raises_oserror(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(OSError):
        plot_losses(metrics(), tmp_path / "missing" / "loss.png")


def test_matplotlib_is_imported_only_to_plot_and_without_pyplot(tmp_path):
    code = (
        "import sys, tinyllm.training.picture; assert 'matplotlib' not in sys.modules;"
        "tinyllm.training.picture.plot_losses([{'step': 0, 'val_loss': 1.0}], sys.argv[1]);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    pytest.importorskip("matplotlib")
    subprocess.run([sys.executable, "-c", code, tmp_path / "loss.svg"], check=True)
    assert (tmp_path / "loss.svg").exists()
