#!/usr/bin/env python3
"""What the libraries that OpenAI's text_similarity names say of pairs of texts, for the tests of
src/grade/text.rs to hold ours to: tests/grade/text.json.

    python3 -m venv /tmp/grade && /tmp/grade/bin/pip install nltk rouge_score rapidfuzz
    /tmp/grade/bin/python scripts/grader_reference.py
"""

import json
import pathlib

from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from nltk.translate.gleu_score import sentence_gleu
from rapidfuzz import fuzz
from rouge_score.rouge_scorer import RougeScorer

FOX = "the quick brown fox jumps over the lazy dog"
PARTY = "It is a guide to action which ensures that the military always obeys the commands of the party"
PARTY2 = "It is a guide to action that ensures that the military will forever heed Party commands"

PAIRS = [
    ("", ""),
    ("", "something"),
    ("something", ""),
    (" \t\n", "   "),
    ("a", "a"),
    ("a", "b"),
    ("Paris", "paris"),
    ("Paris", "Paris."),
    ("two words", "two words"),
    ("three short words", "three short words"),
    ("exactly four words here", "exactly four words here"),
    (FOX, FOX),
    (FOX, FOX.upper()),
    (FOX, "a quick brown dog jumps over the lazy fox"),
    ("the fox", FOX),
    (FOX, "the fox"),
    (PARTY, PARTY2),
    (PARTY2, PARTY),
    ("the the the the the the the", "the cat is on the mat"),
    ("the cat is on the mat", "the the the the the the the"),
    ("a a a a b b b b", "a b a b a b a b"),
    ("dog lazy the over jumps fox brown quick the", FOX),
    ("Hello, world! (It's me.)", "Hello world, it is me"),
    ("...", "!!!"),
    ("?", "?"),
    ("one-two_three", "one two three"),
    ("3.14159", "3.14"),
    ("The answer is 42.", "The answer is 42"),
    ("The answer is 42.", "The answer is 43."),
    ("größe Straße", "GRÖSSE STRASSE"),
    ("naïve café", "naive cafe"),
    ("日本語のテキスト", "日本語テキスト"),
    ("今日は いい 天気 です ね", "今日は 悪い 天気 です ね"),
    ("👩‍👩‍👧 family 👍", "family 👍🏽"),
    ("e\u0301", "\u00e9"),
    ("\u212a and k", "k and \u212a"),
    ("İstanbul is big", "istanbul is big"),
    ("a\u00a0b c", "a b\u3000c"),
    ("line one\nline two\r\nline three", "line one line two line three"),
    ("x" * 300, "x" * 200 + "y" * 100),
    ("ab" * 200, "ba" * 200),
    (" ".join([FOX] * 12), " ".join([PARTY] * 8)),
    (" ".join(str(i) for i in range(400)), " ".join(str(i) for i in range(0, 600, 2))),
    (" ".join(str(i * i % 17) for i in range(300)), " ".join(str(i * i % 19) for i in range(280))),
]

ROUGE = [f"rouge{n}" for n in range(1, 6)] + ["rougeL"]
SMOOTHING = SmoothingFunction().method2


def scores(text, reference):
    found = RougeScorer(ROUGE, use_stemmer=False).score(reference, text)
    words, expected = text.split(), reference.split()
    return {
        "fuzzy_match": fuzz.ratio(text, reference) / 100,
        "bleu": float(sentence_bleu([expected], words, smoothing_function=SMOOTHING)),
        "gleu": float(sentence_gleu([expected], words)),
        **{f"rouge_{n}": float(found[f"rouge{n}"].fmeasure) for n in range(1, 6)},
        "rouge_l": float(found["rougeL"].fmeasure),
    }


rows = [{"input": a, "reference": b, "scores": scores(a, b)} for a, b in PAIRS]
path = pathlib.Path(__file__).parent.parent / "tests/grade/text.json"
path.parent.mkdir(exist_ok=True)
lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
path.write_text(f"[\n{lines}\n]\n")
print(f"{len(rows)} pairs in {path}")
