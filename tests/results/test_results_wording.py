import pytest

from autodet.results.wording import INPUTS, OPERATIONS, TermText, equations, phrase, sentences, terms_of


def test_terms_are_split_as_written() -> None:
    assert terms_of("global: catt(t=0.5) > pool(2) | l1 * 6; logits.roi: kl") == [
        TermText("global", ("catt(t=0.5)", "pool(2)"), "l1", "6"),
        TermText("logits.roi", (), "kl", "1"),
    ]
    assert terms_of("none") == terms_of("") == []


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        ("catt", "stress channels by attention"),
        ("catt(t=0.25)", "stress channels by attention (t = 0.25)"),
        ("catt(0.25)", "stress channels by attention (t = 0.25)"),
        ("pool(2)", "take the maximum of every 2×2 cells"),
        ("patch(p=4)", "cut into patches of 4×4 cells"),
        ("power(2)", "raise to a power (p = 2)"),
        ("norm(nhw)", "scale to length one over the batch and positions"),
        ("softmax(c, t=2)", "turn into probabilities over channels (t = 2)"),
        ("softmax(axis=hw)", "turn into probabilities over positions"),
        ("unknown(3)", "unknown(3)"),
        ("l1(new=3)", "l1(new=3)"),
    ],
)
def test_operations_in_words(operation: str, words: str) -> None:
    assert phrase(operation) == words


def test_formula_in_words_and_as_an_equation() -> None:
    formula = "global: catt > norm(n) | l1 * 6; logits.dense: l2 * 1"
    first, second = sentences(formula)
    assert first.startswith("Take the feature maps of every pyramid level") and first.endswith("weight 6.")
    assert "compare as they are by the mean squared difference" in second
    assert equations(formula) == [
        "6 · l1( φ(S), φ(T) ),  φ = norm(n) ∘ catt  on global",
        "1 · l2( S, T )  on logits.dense",
    ]
    assert sentences("none") == ["No distillation: the student learns from the ground truth alone."]


def test_every_operation_of_the_language_has_words() -> None:
    distances = pytest.importorskip("autodet.distill.distances")
    transforms = pytest.importorskip("autodet.distill.transforms")
    assert set(distances.DISTANCES) | set(transforms.TRANSFORMS) == set(OPERATIONS)


def test_every_input_of_the_language_has_words() -> None:
    inputs = pytest.importorskip("autodet.distill.inputs").INPUTS
    assert set(inputs) == set(INPUTS)
