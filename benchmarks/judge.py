"""A judge of movie reviews that owes nothing to the reward model: TF-IDF and logistic regression over words."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


@dataclass(frozen=True)
class Judge:
    """Made from labelled training rows (``text``, ``label`` 0 or 1). words: every word of those rows."""

    classifier: Pipeline
    words: frozenset[str]

    @classmethod
    def trained(cls, rows: Path) -> Judge:
        texts, labels = labelled(rows)
        classifier = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+"),
            LogisticRegression(C=10.0, max_iter=1000),
        )
        return cls(classifier.fit(texts, labels), frozenset(word for text in texts for word in words(text)))

    def positive_share(self, texts: Sequence[str]) -> float:
        """Share of texts called positive."""
        return float(self.classifier.predict(list(texts)).mean())

    def unknown_share(self, texts: Sequence[str]) -> float:
        """Share of the texts' words that no training row has: words a policy makes up out of pieces."""
        found = [word for text in texts for word in words(text)]
        return sum(word not in self.words for word in found) / max(len(found), 1)

    def pair_accuracy(self, rows: Path) -> float:
        """Over all positive × negative pairs of held-out rows (= the area under the ROC curve)."""
        texts, labels = labelled(rows)
        return float(roc_auc_score(labels, self.classifier.decision_function(texts)))


def labelled(rows: Path) -> tuple[list[str], list[int]]:
    with rows.open(encoding="utf-8") as lines:  # not splitlines: reviews hold U+0085, which it takes for a line's end
        found = [json.loads(line) for line in lines]
    return [row["text"] for row in found], [int(row["label"]) for row in found]


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())
