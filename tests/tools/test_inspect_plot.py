"""Pictures of an inspection: what is drawn are the numbers, and texts are drawn as they are."""

import numpy as np
import pytest
from support.models import EVERYTHING, Wrapped, random_model
from support.pictures import is_png, saved_figures

from tinyllm import Error, nn
from tinyllm.models import SequenceClassifier
from tinyllm.tokenizers.char import CharTokenizer
from tinyllm.tools import inspect_plot
from tinyllm.tools.inspect import inspect
from tinyllm.tools.inspect_plot import (
    drawable,
    plot_attention,
    plot_lens,
    plot_norms,
    plot_surprise,
    thumbnail,
)

CHARS = CharTokenizer("abcdefgh$_ \n…")  # 13 ids, some of them special to matplotlib
IDS = [0, 8, 9, 8, 10, 11, 12, 0]


@pytest.fixture(scope="module")
def found():
    return inspect(random_model(EVERYTHING), IDS)


def picture(figures):
    (figure,) = figures
    return figure.axes[0]


def below(weights):
    return np.where(np.tri(len(weights), dtype=bool), weights, np.nan)


def test_one_map_shows_the_weights_and_the_tokens(found, tmp_path, monkeypatch):
    figures = saved_figures(monkeypatch)
    plot_attention(found, CHARS, tmp_path / "map.png", 1, 4)
    axes = picture(figures)
    assert is_png(tmp_path / "map.png")
    np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), below(found.attention(1, 4)))
    labels = ["a", "$", "_", "$", "␣", "⏎", "…", "a"]
    assert [text.get_text() for text in axes.get_xticklabels()] == labels
    assert [text.get_text() for text in axes.get_yticklabels()] == labels
    assert not any(text.get_parse_math() for text in axes.get_xticklabels())
    assert "layers.1, head 4" in axes.get_title("right")


def test_a_long_map_has_positions_instead_of_names(found, tmp_path, monkeypatch):
    figures = saved_figures(monkeypatch)
    monkeypatch.setattr(inspect_plot, "NAMED", 7)
    plot_attention(found, CHARS, tmp_path / "map.png", 0, 0)
    axes = picture(figures)
    assert "a" not in [text.get_text() for text in axes.get_xticklabels()]


@pytest.mark.parametrize("layer", [None, 1])
def test_a_grid_has_a_thumbnail_for_every_head(found, tmp_path, monkeypatch, layer):
    figures = saved_figures(monkeypatch)
    plot_attention(found, CHARS, tmp_path / "grid.png", layer)
    axes = picture(figures)
    canvas = axes.images[0].get_array().filled(np.nan)
    pixels = 120 if layer is None else 360
    step = pixels * 11 // 10
    for h in range(6):
        for row, shown in enumerate((0, 1) if layer is None else (1,)):
            y, x = (row, h) if layer is None else divmod(h, 3)
            part = canvas[y * step : y * step + pixels, x * step : x * step + pixels]
            middle = [(2 * t + 1) * pixels // 16 for t in range(8)]
            np.testing.assert_array_equal(
                part[middle][:, middle], below(found.attention(shown, h)).astype("f")
            )
    assert np.isnan(canvas[:, pixels:step]).all()


def test_a_thumbnail_keeps_the_largest_weight_of_a_pixel():
    weights = np.tril(np.random.default_rng(0).random((50, 50)))
    small = thumbnail(weights, 20)
    edges = np.arange(21) * 50 // 20
    for y in range(20):
        for x in range(20):
            block = below(weights)[edges[y] : edges[y + 1], edges[x] : edges[x + 1]]
            expected = np.nan if np.isnan(block).all() else np.nanmax(block)
            np.testing.assert_array_equal(small[y, x], expected)


def test_a_layer_without_attention_is_named_in_the_grid(tmp_path, monkeypatch):
    class Nothing(nn.Module):
        def forward(self, x, *_):
            return x

    figures, model = saved_figures(monkeypatch), random_model(EVERYTHING)
    nn.replace(model, "layers.0.self_attn", lambda name, layer: Nothing())
    found = inspect(model, IDS)
    plot_attention(found, CHARS, tmp_path / "grid.png")
    axes = picture(figures)
    assert "the attention of 0 cannot be seen" in [text.get_text() for text in axes.texts][-1]
    with pytest.raises(Error, match=r"layers\.0 cannot be seen"):
        plot_attention(found, CHARS, tmp_path / "grid.png", layer=0)
    nn.replace(model, "layers.1.self_attn", lambda name, layer: Nothing())
    with pytest.raises(Error, match=r"layers\.0 cannot be seen"):
        plot_attention(inspect(model, IDS), CHARS, tmp_path / "grid.png")


def test_the_lens_shows_the_most_likely_tokens_and_frames_those_that_came(found, tmp_path, monkeypatch):
    figures = saved_figures(monkeypatch)
    plot_lens(found, CHARS, tmp_path / "lens.png")
    axes = picture(figures)
    np.testing.assert_array_equal(axes.images[0].get_array(), found.lens.probabilities[:, :, 0])
    texts = {(t.get_position()): t.get_text() for t in axes.texts if t.get_rotation() == 0}
    label = ["a", "b", "c", "d", "e", "f", "g", "h", "$", "_", "␣", "⏎", "…"]
    assert texts == {(t, x): label[found.lens.ids[x, t, 0]] for x in range(3) for t in range(8)}
    framed = {tuple(line.get_xydata().mean(axis=0).round(1)) for line in axes.lines}
    came = {(x, t) for x in range(3) for t in range(7) if found.lens.ids[x, t, 0] == IDS[t + 1]}
    assert len(axes.lines) == len(came) == len(framed)
    assert [t.get_text() for t in axes.texts if t.get_rotation() != 0] == [label[i] for i in IDS[1:]]


def test_a_long_lens_has_several_panels_of_the_last_positions(found, tmp_path, monkeypatch):
    figures = saved_figures(monkeypatch)
    monkeypatch.setattr(inspect_plot, "LENS_COLUMNS", 6)
    monkeypatch.setattr(inspect_plot, "LENS_TOKENS", 7)
    plot_lens(found, CHARS, tmp_path / "lens.png")
    first, second = figures[0].axes
    np.testing.assert_array_equal(first.images[0].get_array(), found.lens.probabilities[:, 1:7, 0])
    np.testing.assert_array_equal(second.images[0].get_array(), found.lens.probabilities[:, 7:, 0])
    assert "the last 7 positions" in figures[0].get_suptitle()


def test_a_classifiers_lens_shows_its_classes(tmp_path, monkeypatch):
    figures = saved_figures(monkeypatch)
    found = inspect(SequenceClassifier(random_model(EVERYTHING), ["bad", "good"], rng=0), IDS)
    plot_lens(found, CHARS, tmp_path / "lens.png")
    axes = picture(figures)
    assert {text.get_text() for text in axes.texts} <= {"class 0", "class 1"}
    with pytest.raises(Error, match="surprise=True"):
        plot_surprise(found, CHARS, tmp_path / "surprise.png")


def test_surprise_has_a_box_for_every_token(found, tmp_path, monkeypatch):
    figures = saved_figures(monkeypatch)
    plot_surprise(found, CHARS, tmp_path / "surprise.png")
    axes = picture(figures)
    labels = ["a", "$", "_", "$", " ", "⏎", "…", "a"]
    assert [t.get_text() for t in axes.texts if t.get_fontsize() == 9] == labels
    colours = [patch.get_facecolor() for patch in axes.patches]
    assert colours[0][3] == 0  # the first token is not predicted
    map_ = inspect_plot._colours(inspect_plot.REDS)
    for p, colour in zip(found.probability[1:], colours[1:]):
        assert colour == pytest.approx(map_(min(-np.log2(p) / 16, 1.0)))
    lines = {round(patch.get_y() - 0.06): patch for patch in axes.patches}
    assert set(lines) == {0, 1}  # the newline ends the first


def test_norms_are_the_curves(found, tmp_path, monkeypatch):
    figures = saved_figures(monkeypatch)
    plot_norms(found, CHARS, tmp_path / "norms.png")
    axes = picture(figures)
    curves = np.array([line.get_ydata() for line in axes.lines])
    np.testing.assert_array_equal(curves[:8], found.norms.T)
    np.testing.assert_array_equal(curves[8], np.median(found.norms, axis=1))
    largest = found.norms.max(axis=0).argmax()
    np.testing.assert_array_equal(curves[9], found.norms[:, largest])
    assert axes.lines[0].get_xdata().tolist() == [-1, 0, 1]


def test_characters_without_a_glyph_are_escaped():
    assert drawable("aé·⏎␣…") == "aé·⏎␣…"
    assert drawable("\U0001f9a3\U00010ffd") in ("\\U0001f9a3\\U00010ffd", "\U0001f9a3\\U00010ffd")


def test_wrapped_models_and_wrong_requests(found, tmp_path):
    model = random_model(EVERYTHING)
    nn.replace(model, "layers.0", lambda name, layer: Wrapped(layer))
    plot_attention(inspect(model, IDS), CHARS, tmp_path / "a.png")
    for path, layer, head, message in (
        ("a.txt", None, None, "must end in .png"),
        ("a.png", None, 3, "without a layer"),
        ("a.png", 2, None, "layers 0 to 1"),
        ("a.png", 0, 6, "heads 0 to 5"),
        ("no/a.png", 0, 0, "cannot be written"),
    ):
        with pytest.raises(Error, match=message):
            plot_attention(found, CHARS, tmp_path / path, layer, head)
    with pytest.raises(Error, match="positions=None"):
        plot_lens(inspect(model, IDS, positions=()), CHARS, tmp_path / "a.png")
