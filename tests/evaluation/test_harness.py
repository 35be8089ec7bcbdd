"""Tasks of lm-evaluation-harness, from YAML and JSON files beside this one, against the model itself."""

from pathlib import Path

import jax
import numpy as np
import pytest

from gdn2_jax.data import load_tokenizer
from gdn2_jax.evaluation import on_local_devices, text_perplexity
from gdn2_jax.evaluation.tables import table_row, table_tasks
from gdn2_jax.evaluation.texts import windows
from gdn2_jax.models import LanguageModel, generate
from gdn2_jax.rows import read_rows

pytest.importorskip("lm_eval", reason='needs pip install ".[eval]"')
from gdn2_jax.evaluation.harness import HarnessModel, run_tasks

BYTES = load_tokenizer("bytes")
HERE = Path(__file__).parent
WINDOW = 63


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def harness_model(hybrid):
    def make(batch_size, devices):
        model = on_local_devices(*hybrid, jax.local_devices()[:devices])
        return HarnessModel(model, BYTES, max_length=WINDOW, batch_size=batch_size, progress=False)

    return make


@pytest.fixture(scope="module")
def log_likelihoods(hybrid):
    """A function of tokens: of each but the first its log-likelihood, and the likeliest one."""
    config, params = hybrid
    apply = jax.jit(lambda tokens: LanguageModel(config).apply({"params": params}, tokens[None])[0])

    def call(tokens):
        padded = np.zeros(WINDOW + 1, np.int32)
        padded[: len(tokens)] = tokens
        logits = np.asarray(apply(padded), np.float64)[: len(tokens) - 1]
        log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return log_softmax[range(len(logits)), tokens[1:]], logits.argmax(-1)

    return call


def run(model, tasks, **options):
    missing = {}
    options = {"data_folder": HERE / "data_sets", "missing": missing.__setitem__} | options
    return run_tasks(model, tasks, **options), missing


@pytest.fixture(scope="module")
def results(harness_model):
    found, missing = run(harness_model(2, 2), ["toy"], folder=HERE / "tasks")
    assert not missing
    return found


def answers(results, task):
    return [sample["filtered_resps"] for sample in results["samples"][task]]


def test_log_likelihoods_of_choices_are_those_of_the_model(results, log_likelihoods):
    documents = read_rows(HERE / "data_sets" / "toy" / "choice.jsonl")
    right = 0
    for document, found in zip(documents, answers(results, "toy_choice"), strict=True):
        expected = []
        for choice in document["choices"]:
            context = [256, *f"Question: {document['question']}\nAnswer:".encode()]
            continuation = [*f" {choice}".encode()]
            tokens = [*context, *continuation][-WINDOW - 1 :]
            each, likeliest = log_likelihoods(tokens)
            count = len(continuation)
            expected.append((each[-count:].sum(), (likeliest == tokens[1:])[-count:].all()))
        np.testing.assert_allclose([x[0] for x in found], [x[0] for x in expected], rtol=1e-5)
        assert [x[1] for x in found] == [x[1] for x in expected]
        right += np.argmax([x[0] for x in expected]) == document["label"]
    assert results["results"]["toy_choice"]["acc,none"] == pytest.approx(right / len(documents))


def test_rolling_log_likelihoods_are_those_of_the_windows(results, log_likelihoods, hybrid):
    pages = [row["page"] for row in read_rows(HERE / "data_sets" / "toy" / "pages.jsonl")]
    for page, found in zip(pages, answers(results, "toy_rolling"), strict=True):
        tokens = [256, *page.encode()]
        expected = sum(
            log_likelihoods(tokens[w.start : w.stop])[0][-w.count :].sum()
            for w in windows(len(tokens), WINDOW, WINDOW)
        )
        assert found[0] == pytest.approx(expected, rel=1e-5)
    ours = text_perplexity(
        on_local_devices(*hybrid, jax.local_devices()[:1]), BYTES, pages, length=WINDOW
    )
    metrics = results["results"]["toy_rolling"]
    assert metrics["bits_per_byte,none"] == pytest.approx(ours.total.bits_per_byte, rel=1e-5)
    assert metrics["word_perplexity,none"] == pytest.approx(ours.word_perplexity, rel=1e-4)


def test_generated_texts_are_those_of_the_model_up_to_a_stop_string(results, hybrid):
    pages = [row["page"] for row in read_rows(HERE / "data_sets" / "toy" / "pages.jsonl")]
    for page, found in zip(pages, answers(results, "toy_until"), strict=True):
        prompt = [256, *page.encode()][12 - WINDOW :]
        (tokens,) = generate(*hybrid, [prompt], max_new_tokens=12, temperature=0, eos=256)
        text = BYTES.decode(tokens[len(prompt) :])
        assert found[0] == text.split("\n")[0].split("a")[0]


def test_results_do_not_depend_on_the_batch_size(results, harness_model):
    again, _ = run(harness_model(1, 1), ["toy"], folder=HERE / "tasks")
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert again["results"][task][name] == pytest.approx(value, rel=1e-4)
    assert answers(again, "toy_until") == answers(results, "toy_until")


def test_the_harness_prints_its_table(results):
    from lm_eval.utils import make_table

    table = make_table(results)
    for name in ("toy_choice", "toy_rolling", "toy_until", "word_perplexity", "acc_norm"):
        assert name in table


def test_missing_data_are_told_and_the_others_run(harness_model):
    tasks = table_tasks("table4", BYTES)
    found, missing = run(harness_model(2, 1), tasks, limit=2)
    assert missing.keys() == {task["task"] for task in tasks} - {"based_swde"}
    assert "hazyresearch/based-fda" in missing["based_fda"]
    assert 0 <= table_row("table4", found["results"])[0] <= 100
    assert table_row("table4", found["results"])[1:] == [None] * 6
    (document,) = (sample["doc"] for sample in found["samples"]["based_swde"])
    assert document["prompt"].endswith("It was made in a barn. Runtime:")


def test_a_task_of_no_name_is_refused(harness_model):
    with pytest.raises(ValueError, match="^tasks: expected names of tasks, got no_such_task$"):
        run(harness_model(1, 1), ["no_such_task"])


def test_a_continuation_longer_than_the_window_is_refused(harness_model):
    with pytest.raises(ValueError, match="^max_length: expected at least the 64 tokens .* got 63"):
        harness_model(1, 1)._loglikelihood_tokens([(None, [256], [97] * 64)])
