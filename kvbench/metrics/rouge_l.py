"""ROUGE-L as LongBench reports it: summary level, over distinct words.

Equal bit for bit to `Rouge().get_scores([prediction], [reference], avg=True)["rouge-l"]["f"]` of the package `rouge`
1.0.1 (PyPI, pltrdy/rouge), which LongBench/metrics.py calls, with two differences: where the package raises because a
text has no sentence, the score is 0.0 (LongBench's bare except says the same), and long sentences are scored instead of
overflowing the recursion limit, which the same except turns into 0.0.

It is not the ROUGE-L of the package `rouge_score`: no lower-casing, no stemming, punctuation sticks to the words.
"""

from __future__ import annotations

from kvbench.metrics.lcs import lcs_words


def split_sentences(text: str) -> list[list[str]]:
    """Sentences between full stops as lists of words.

    Every "." separates, also the one in 12.5; empty pieces are dropped, blank ones are not and hold one empty word.

    Args:
        text: any text.

    Returns:
        One list of words per sentence.
    """
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the union of longest common subsequences, counted in distinct words.

    The words that any longest common subsequence of a reference sentence and a prediction sentence uses are the hits;
    recall is their share of the reference's distinct words, precision of the prediction's.

    Args:
        prediction: text to score.
        reference: text to score it against.

    Returns:
        F-measure in [0, 1); 0.0 if either text has no sentence. Equal texts score 0.999999995 (the package adds 1e-8 to
        the denominator).

    Raises:
        MetricError: if the texts are too long for an exact score (`lcs.check_pairs`).
    """
    predicted = split_sentences(prediction)
    referenced = split_sentences(reference)
    if not predicted or not referenced:
        return 0.0
    hits = lcs_words(referenced, predicted)
    recall = len(hits) / len({word for sentence in referenced for word in sentence})
    precision = len(hits) / len({word for sentence in predicted for word in sentence})
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))
