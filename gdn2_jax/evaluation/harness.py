"""Tasks of lm-evaluation-harness on our models; needs the extra "eval", not PyTorch."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from gdn2_jax.data import Tokenizer
from gdn2_jax.evaluation.scoring import LocalModel, continue_prompts, score_tokens
from gdn2_jax.evaluation.texts import windows
from gdn2_jax.fields import require


class HarnessModel(TemplateLM):
    """A language model as the harness wants it.

    Texts that are longer than `max_length` lose their beginning, as in the harness' own models. Results
    depend on the batch size by rounding only; the harness prints what they are made of.

    Attributes:
      max_length: tokens that the model reads at most.
      max_gen_toks: tokens that it adds where a task names no number.
    """

    max_gen_toks = 256

    def __init__(
        self,
        model: LocalModel,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        batch_size: int,
        first: int | None = None,
        progress: bool = True,
    ):
        """Takes a model.

        Args:
          model: from `on_local_devices`.
          tokenizer: of the model.
          max_length: tokens that it reads at most.
          batch_size: sequences at once on each device.
          first: token before each text; the one that ends a document if None.
          progress: show bars.
        """
        super().__init__()
        self._model, self._tokens, self._progress = model, tokenizer, progress
        self.max_length, self.batch_size = max_length, batch_size
        self._first = tokenizer.end_of_document if first is None else first

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._tokens.end_of_document

    @property
    def prefix_token_id(self) -> int:
        """The token before each text."""
        return self._first

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the tokens of a text, after the one before each text unless that is unwanted."""
        ids = self._tokens.encode(string).tolist()
        return ids if add_special_tokens is False else [self._first, *ids]

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens."""
        return self._tokens.decode(tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        rows, counts = [], []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"max_length: expected at least the {len(continuation)} tokens of every "
                    f"continuation, none of them empty, got {self.max_length}"
                )
            rows.append([*context, *continuation][-self.max_length - 1 :])
            counts.append(len(continuation))
        scores = self._score(rows, counts, disable_tqdm, "log-likelihoods")
        results = [(-float(score.losses.sum()), bool(score.hits.all())) for score in scores]
        for (texts, *_), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each text; each token is scored once."""
        rows, counts, texts = [], [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in windows(len(tokens), self.max_length, self.max_length):
                rows.append(tokens[window.start : window.stop])
                counts.append(window.count)
                texts.append(number)
        results = [0.0] * len(requests)
        scores = self._score(rows, counts, disable_tqdm, "rolling log-likelihoods")
        for number, score in zip(texts, scores, strict=True):
            results[number] -= float(score.losses.sum())
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Returns how each context goes on, without the string at which it stops."""
        kinds: dict[str, tuple[Any, list[int]]] = {}
        for number, request in enumerate(requests):
            options = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            kinds.setdefault(repr(sorted(options.items())), (options, []))[1].append(number)
        results = [""] * len(requests)
        for options, numbers in kinds.values():
            until = [text for text in options["until"] if text]
            new = options["max_gen_toks"]
            more = f"more than the {new} tokens that a task adds"
            require("max_length", new < self.max_length, more, self.max_length)
            prompts = [
                self.tok_encode(requests[number].args[0])[new - self.max_length :]
                for number in numbers
            ]
            sampling = {}
            if options.get("do_sample"):
                sampling = {
                    name: options[name]
                    for name in ("temperature", "top_k", "top_p")
                    if options.get(name) is not None
                }
            texts = continue_prompts(
                self._model,
                self._tokens,
                prompts,
                max_new_tokens=new,
                batch_size=self.batch_size,
                stop=until,
                progress=self._bar(disable_tqdm, "generation"),
                **sampling,
            )
            for number, text in zip(numbers, texts, strict=True):
                results[number] = postprocess_generated_text(text, until, None)
                self.cache_hook.add_partial(
                    "generate_until", requests[number].args, results[number]
                )
        return results

    def _score(self, rows, counts, disable_tqdm, name):
        return score_tokens(
            self._model,
            rows,
            counts,
            batch_size=self.batch_size,
            progress=self._bar(disable_tqdm, name),
        )

    def _bar(self, disable_tqdm: bool, name: str) -> str | None:
        return name if self._progress and not disable_tqdm else None


def run_tasks(
    model: HarnessModel,
    tasks: Sequence[str | dict[str, Any]],
    *,
    folder: Path | None = None,
    data_folder: Path | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    missing: Callable[[str, str], None],
) -> dict[str, Any] | None:
    """Runs tasks of the harness.

    Args:
      model: to evaluate.
      tasks: names of tasks or groups, or configurations of tasks.
      folder: with YAML files of further tasks. If it has all `tasks`, those of the harness are not
        looked for, which takes some 15 seconds.
      data_folder: with copies of data sets by their names; they are read before all others.
      fewshot: examples before each question; a task's own number if None.
      limit: examples of each task at most.
      missing: called with the name and the reason of each task whose data are not there. The others
        run.

    Returns:
      What `lm_eval.simple_evaluate` returns; None if no task has data.

    Raises:
      ValueError: there is no task of a name.
    """
    # It tells of every task and setting.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    include = None if folder is None else str(folder.absolute())
    manager = TaskManager(include_path=include, include_defaults=False)
    names = [task for task in tasks if isinstance(task, str)]
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include)
        for name in names:
            if name not in manager.all_tasks:
                raise ValueError(f"tasks: expected names of tasks, got {name}")
    found = []
    for task in tasks:
        name = task if isinstance(task, str) else task["task"]
        try:
            # Data sets are looked for below the working directory first.
            with contextlib.chdir(data_folder or "."):
                loaded = manager.load([task])
        # The data sets' library has several errors of each kind.
        except (OSError, ValueError) as error:
            missing(name, str(error).partition("\n")[0])
            continue
        groups = loaded.get("groups", {})
        found += [groups[name]] if name in groups else loaded["tasks"].values()
    if not found:
        return None
    evaluate: Any = simple_evaluate  # A decorator hides its arguments from type checkers.
    return evaluate(
        model=model,
        tasks=found,
        task_manager=manager,
        num_fewshot=fewshot,
        limit=limit,
        # It would fork this process, whose threads compile and compute.
        bootstrap_iters=0,
    )
