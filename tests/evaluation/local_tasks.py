"""A group of two tasks of lm-eval whose data lies in the same folder."""

from __future__ import annotations

import json
from pathlib import Path

CHOICES = ("strong", "land", "hope")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.5
"""

GROUP = """
group: words
task: [first_word, last_word]
aggregate_metric_list:
  - metric: acc
    aggregation: mean
metadata:
  version: 2.0
"""

WORDS = {
    "first_word": ["the state of our union is", "people work for peace with", "hope in every"],
    "last_word": ["our union is", "people work in every", "for peace with"],
}


def write_tasks(folder: Path) -> Path:
    """Write the tasks ``first_word`` and ``last_word`` and the group ``words``; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, questions in WORDS.items():
        rows = [{"question": text, "choices": CHOICES, "answer": place} for place, text in enumerate(questions)]
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file), encoding="utf-8")
    (folder / "words.yaml").write_text(GROUP, encoding="utf-8")
    return folder
