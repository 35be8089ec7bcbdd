"""The columns of the paper's tables 2 and 4 (arXiv 2605.22791) as tasks of lm-evaluation-harness.

Table 4 follows "Just Read Twice" (arXiv 2407.05483): documents that are cut around the answer to 2,000
tokens, a question or the beginning of a sentence, and any answer that contains the wanted words.
The harness has tasks of the same names on the whole documents; they give other numbers.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from gdn2_jax.data import Tokenizer


class TableColumn(NamedTuple):
    """A column of a table.

    Attributes:
      name: in the paper.
      averaged: a share, printed in percent, that counts in the table's average.
    """

    name: str
    task: str
    metric: str
    averaged: bool = True


TABLES = {
    "table2": (
        TableColumn("Wiki ppl", "wikitext", "word_perplexity", averaged=False),
        TableColumn("LMB ppl", "lambada_openai", "perplexity", averaged=False),
        TableColumn("LMB", "lambada_openai", "acc"),
        TableColumn("PIQA", "piqa", "acc"),
        TableColumn("Hella", "hellaswag", "acc_norm"),
        TableColumn("Wino", "winogrande", "acc"),
        TableColumn("ARC-e", "arc_easy", "acc"),
        TableColumn("ARC-c", "arc_challenge", "acc"),
        TableColumn("OBQA", "openbookqa", "acc"),
        TableColumn("SIQA", "social_iqa", "acc"),
        TableColumn("BoolQ", "boolq", "acc"),
    ),
    "table4": (
        TableColumn("SWDE", "based_swde", "contains"),
        TableColumn("SQD", "based_squad", "contains"),
        TableColumn("FDA", "based_fda", "contains"),
        TableColumn("TQA", "based_triviaqa", "contains"),
        TableColumn("NQ", "based_nq_2048", "contains"),
        TableColumn("DROP", "based_drop", "contains"),
    ),
}
"""The tables whose columns are tasks of the harness, all without examples before the question."""

_DATA_SETS = {
    "based_swde": "hazyresearch/based-swde-v2",
    "based_squad": "hazyresearch/based-squad",
    "based_fda": "hazyresearch/based-fda",
    "based_triviaqa": "hazyresearch/based_triviaqa",
    "based_nq_2048": "hazyresearch/based_nq_2048",
    "based_drop": "hazyresearch/based_drop",
}
_NEW_TOKENS = 48
_DOCUMENT_TOKENS = 2000


def table_tasks(table: str, tokenizer: Tokenizer) -> list[str | dict[str, Any]]:
    """Returns the tasks of a table, for `gdn2_jax.evaluation.harness.run_tasks`."""
    names = dict.fromkeys(column.task for column in TABLES[table])
    return [_recall_task(name, tokenizer) if name in _DATA_SETS else name for name in names]


def table_row(table: str, results: dict[str, dict[str, Any]]) -> list[float | None]:
    """Returns the values of a table's columns, and the average if none of its values is missing.

    `results` are the harness's: metrics by task.
    """
    values = []
    for column in TABLES[table]:
        value = results.get(column.task, {}).get(f"{column.metric},none")
        values.append(100 * value if value is not None and column.averaged else value)
    shares = [x for x, column in zip(values, TABLES[table], strict=True) if column.averaged]
    average = None if None in shares else sum(shares) / len(shares)
    return [*values, average]


def _recall_task(name: str, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": _DATA_SETS[name],
        "validation_split": "validation",
        "output_type": "generate_until",
        "process_docs": functools.partial(recall_documents, name, tokenizer),
        "doc_to_text": lambda document: document["prompt"],
        "doc_to_target": lambda document: document["answers"][0],
        "process_results": lambda document, outputs: {
            "contains": contains(outputs[0], document["answers"])
        },
        "generation_kwargs": {
            "until": ["\n"],
            "do_sample": False,
            "max_gen_toks": _NEW_TOKENS,
        },
        "metric_list": [{"metric": "contains", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }


def contains(output: str, answers: Sequence[str]) -> float:
    """Returns 1 if the output contains one of the answers, else 0; case does not count."""
    return float(any(answer.lower() in output.lower() for answer in answers))


def recall_documents(name: str, tokenizer: Tokenizer, documents: Any) -> Any:
    """Makes the prompts of a data set; documents whose key or value is one character are left out.

    Args:
      name: of the task.
      tokenizer: of the model; documents are cut to 2,000 of its tokens.
      documents: a `datasets.Dataset` with the columns text, key and value, or with context,
        question and answers.

    Returns:
      A `datasets.Dataset` with the columns prompt and answers.
    """
    kept = []
    for document in documents:
        if "question" in document:
            question = document["question"].strip()
            text = _cut(tokenizer, document["context"], 0)
            text = re.sub(r"\[(PAR|DOC|TLE)\]", "", text).strip()
            text = text.removesuffix(question).strip().strip(".")
            answers = document["answers"]
            answers = [answers] if isinstance(answers, str) else list(answers)
            kept.append({"prompt": f"{text}. {question}", "answers": answers})
            continue
        key, value = document["key"], document["value"]
        fields = [value] if name == "based_squad" else [key, value]
        if min(map(len, fields)) <= 1:
            continue
        text = document["text"].strip()
        found = [text.lower().find(field.lower()) for field in fields]
        # Where neither is found, the end of the document is kept.
        place = min((place for place in found if place >= 0), default=len(text) - 1)
        text = _cut(tokenizer, text, len(tokenizer.encode(text[:place])))
        if name != "based_squad":
            text = text.split("Summary of information above")[0].strip()
            text = re.sub(re.escape(key) + r":$", "", text, flags=re.IGNORECASE).strip().strip(".")
            text = f"{text}. {key[:1].upper()}{key[1:]}:"
        kept.append({"prompt": text.strip(), "answers": [value]})
    return type(documents).from_list(kept)


def _cut(tokenizer: Tokenizer, text: str, place: int) -> str:
    """The text around a token; from its beginning if `place` is 0."""
    tokens = tokenizer.encode(text.strip())
    start = max(0, place - _DOCUMENT_TOKENS // 2)
    return tokenizer.decode(tokens[start : place + _DOCUMENT_TOKENS - (place - start)])
