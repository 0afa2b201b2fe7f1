"""The lexical verbs, one after the other as a person would type them, and what they refuse."""

from __future__ import annotations

import json

import pytest

from hf_distill.cli.main import main
from hf_distill.models import LexicalRetriever, load_model
from tests.hub_client import verb
from tests.model_zoo import save_tiny
from tests.test_cli_runs import refusal


TRAINING = ["--use_cpu", "true", "--report_to", "none", "--per_device_train_batch_size", "8", "--num_negatives", "3"]
SHORT = [
    *TRAINING,
    "--max_steps",
    "4",
    "--logging_steps",
    "2",
    "--eval_strategy",
    "no",
    "--learning_rate",
    "1e-3",
    "--passage_length",
    "32",
]


@pytest.fixture(scope="module")
def world(micro, tmp_path_factory, tiny_tokenizer):
    """Pre-training, a lexical retriever, its negatives and scores, and a dense student of them (LED)."""
    root = tmp_path_factory.mktemp("lexical")
    start = save_tiny(root / "start", "bert", tiny_tokenizer, head="MaskedLM", layers=2)

    def run(verb: str, folder: str, **flags) -> str:
        words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", *_words(value))]
        extra = ["--cache_dir", str(root / "cache")] if "stream" not in flags else []
        main(
            [
                verb,
                *words,
                *extra,
                "--output_dir",
                str(root / folder),
                *(SHORT if verb in ("train", "distill") else []),
            ]
        )
        return str(root / folder)

    made = {"root": root, "run": run, "start": start}
    pretrain = {
        "use_cpu": "true",
        "report_to": "none",
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "logging_steps": 1,
    }
    made["lexmae"] = run("pretrain", "lexmae", data=micro, model=start, passage_length=32, **pretrain)
    files = [micro / "corpus.jsonl"]
    made["streamed"] = run("pretrain", "streamed", stream=files[0], model=start, passage_length=32, **pretrain)
    mining = {"mine_depth": 20, "mine_negatives": 6}
    made["bm25"] = run("mine", "bm25", data=micro, model="bm25", **mining)
    made["lexical"] = run(
        "train", "lexical", data=micro, model=made["lexmae"], kind="lexical", rows=made["bm25"], pooled_tokens="text"
    )
    made["mined"] = run("mine", "mined", data=micro, model=made["lexical"], name="sp-stg1", index="Impact", **mining)
    made["pool"] = run("pool", "pool", data=micro, rows=[made["bm25"], made["mined"]])
    made["scored"] = run(
        "score", "scored", data=micro, rows=made["pool"], model=made["lexical"], column="scores_lexical"
    )
    losses = [{"name": "contrastive", "candidates": "global"}, {"name": "rank_consistency", "teacher": "teacher"}]
    made["led"] = run(
        "distill", "led", data=micro, rows=made["scored"], teacher="column:scores_lexical", student=start,
        losses=json.dumps(losses), negative_sources='{"bm25": 1, "sp-stg1": 2}', baseline="false",
    )  # fmt: skip
    made["figures"] = run("evaluate", "figures", data=micro, model=[made["lexical"], made["led"]])
    return made


def _words(value) -> list:
    return value if isinstance(value, list) else [value]


@pytest.mark.slow
def test_from_pretraining_to_a_dense_student(world):
    assert isinstance(load_model(world["lexical"]), LexicalRetriever)
    for name, system in (("lexical", "trained"), ("led", "student")):
        metrics = json.loads((world["root"] / name / "metrics.json").read_text())["micro/test"]
        assert 0 <= metrics[system]["nDCG@10"] <= 1, name
    history = json.loads((world["root"] / "lexical" / "history.json").read_text())
    logged = next(entry for entry in history if "flops" in entry)
    assert {"contrastive", "flops", "active_terms_query", "active_terms_passage", "expected_flops"} <= set(logged)
    card = (world["root"] / "lexical" / "README.md").read_text()
    assert "SparseEncoder" in card and "an inverted index can search them" in card and "- sparse\n" in card
    card = (world["root"] / "led" / "README.md").read_text()
    assert "trained with LED" in card and "2208.13661" in card and "SentenceTransformer" in card
    history = json.loads((world["root"] / "led" / "history.json").read_text())
    assert any("rank_consistency" in entry for entry in history)


@pytest.mark.slow
def test_a_pretrained_model_says_what_it_is(world):
    for name in ("lexmae", "streamed"):
        folder = world["root"] / name
        card = (folder / "README.md").read_text()
        assert "AutoModelForMaskedLM" in card and "library_name: transformers" in card and "LexMAE" in card
        assert "a distribution over the vocabulary" in card and "pre-trained further with LexMAE" in card
        assert "- lexmae\n" in card and "datasets:" not in card
        assert "encoder loss" in card.split("## Measured")[1].split("## Training")[0]
        manifest = json.loads((folder / "run_manifest.json").read_text())
        assert manifest["training"]["steps"] == 3 and manifest["training"]["decoder_loss"] > 0


def test_the_card_of_a_new_masked_language_model(micro, tiny_tokenizer, tmp_path):
    """Nothing of LexMAE, of the weights of its model, or of data that nobody else has."""
    start = save_tiny(tmp_path / "start", "bert", tiny_tokenizer, head="MaskedLM", layers=1)
    short = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "true", "--report_to", "none"]
    words = ["pretrain", "--data", micro, "--model", start, "--decoder_layers", "0", "--fresh", "true", *short]
    main([*map(str, words), "--output_dir", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A new model of the architecture" in card and "by masked language modelling" in card
    assert not {"lexmae", "LexMAE", "further", "datasets:", "base_model:"} & set(card.replace("`", " ").split())
    assert "2208.14754" not in card and "citation" not in card.lower()
    assert card.count("encoder loss") == 1 and "Nothing." not in card


@pytest.mark.slow
@pytest.mark.parametrize("question", ["how is bread made", None])
def test_terms_are_shown_and_drawn(question, world, micro, capsys):
    """Of a question and the best passage, or of the first judged question and a relevant passage."""
    folder = world["root"] / f"terms-{question}"
    command = ["explain", "--data", micro, "--model", world["lexical"], "--top", "5"]
    command += ["--query", question] if question else []
    main([*map(str, command), "--output_dir", str(folder), "--cache_dir", str(world["root"] / "cache")])
    shown = capsys.readouterr()
    assert "part of the score" in shown.out + shown.err
    entry = json.loads((folder / "terms.json").read_text())
    if question is None:
        judged = [line.split("\t") for line in (micro / "qrels" / "test.tsv").read_text().splitlines()[1:]]
        texts = {
            one["_id"]: one["text"]
            for name in ("queries", "corpus")
            for one in map(json.loads, (micro / f"{name}.jsonl").read_text().splitlines())
        }
        pairs = [(texts[query], texts[document]) for query, document, grade in judged if int(grade) > 0]
        assert any(query == entry["query"] and passage in entry["passage"] for query, passage in pairs)
    terms = entry["terms"]
    for column in terms.values():
        weights = list(column.values())
        assert weights == sorted(weights, reverse=True)
    name, product = next(iter(terms["shared"].items()))
    assert product == pytest.approx(terms["query"][name] * terms["passage"][name])
    assert (folder / "terms.png").stat().st_size > 10_000


@pytest.mark.slow
def test_indexes_for_other_engines(world, micro):
    world["run"]("export", "anserini", data=micro, model=world["lexical"])
    assert len(list((world["root"] / "anserini" / "corpus").iterdir())) == 24
    world["run"]("export", "ciff", data=micro, model=world["lexical"], format="ciff")
    assert (world["root"] / "ciff" / "index.ciff").stat().st_size > 1000


def test_a_bare_checkpoint_is_searched_as_asked(micro, tiny_tokenizer, tmp_path, capsys):
    """A masked language model and nothing else, as the first SPLADE models were published."""
    bare = save_tiny(tmp_path / "bare", "bert", tiny_tokenizer, head="MaskedLM", layers=2)
    found = {}
    for prefix in ("", "dense:", "lexical:"):
        words = ["search", "--data", micro, "--model", f"{prefix}{bare}", "--query", "bread", "--cache_dir", tmp_path]
        main([*map(str, words)])
        shown = capsys.readouterr()
        assert (f"write lexical:{bare}" in " ".join(shown.err.split())) == (not prefix)
        found[prefix] = shown.out
    assert found[""] == found["dense:"] != found["lexical:"]


@pytest.mark.parametrize("profile", ["smoke", "paper"])
@pytest.mark.parametrize("recipe", ["led", "lexmae"])
def test_the_recipes_can_be_run(recipe, profile, micro, tiny_tokenizer, tmp_path, capsys):
    """Every stage's settings are looked at, with an encoder that is here."""
    encoder = save_tiny(tmp_path / "encoder", "bert", tiny_tokenizer, head="MaskedLM", layers=2)
    names = ["encoder", *(["lexical_encoder"] if (recipe, profile) == ("led", "paper") else [])]
    chosen = [word for name in names for word in ("--set", f"{name}={encoder}")]
    command = ["recipe", recipe, "--profile", profile, "--set", f"data={micro}", *chosen, "--dry-run"]
    main([*command, "--output_dir", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "stage_3" in shown if recipe == "lexmae" else "led_ranker" in shown


@pytest.mark.slow
def test_texts_of_the_hub_are_read_as_they_come(hub, hub_client, micro, tiny_tokenizer, tmp_path):
    """A data set of the Hub gives the weights that the same file here gives."""
    texts = "".join(json.dumps({"text": json.loads(line)["text"]}) + "\n" for line in (micro / "corpus.jsonl").open())
    hub.add_repo("alice/texts", {"train.jsonl": texts.encode()}, kind="dataset")
    (tmp_path / "train.jsonl").write_text(texts)
    start = save_tiny(tmp_path / "start", "bert", tiny_tokenizer, head="MaskedLM", layers=2)
    words = ["pretrain", "--model", start, "--passage_length", "16", "--use_cpu", "true", "--report_to", "none"]
    words += ["--per_device_train_batch_size", "8", "--max_steps", "12"]  # more than the texts once
    weights = []
    for number, stream in enumerate(("alice/texts", tmp_path / "train.jsonl")):
        out = tmp_path / str(number)
        assert hub_client(verb, *words, "--stream", stream, "--output_dir", out) == (0, "")
        weights.append([(out / f"{part}.safetensors").read_bytes() for part in ("model", "training_modules")])
    assert weights[0] == weights[1]
    assert any("train.jsonl" in request.path for request in hub.requests)


def test_what_is_refused(micro, tiny_bert, tmp_path, capsys):
    out = ["--output_dir", tmp_path / "out"]
    train = ["train", "--data", micro, "--model", tiny_bert, *out, *SHORT]
    assert "no trained masked-LM head" in refusal(capsys, *train, "--kind", "lexical")
    lexical = [*train, "--kind", "lexical", "--new_head", "identity"]
    assert "no index of a lexical model" in refusal(capsys, *lexical, "--index", "IVF4,Flat")
    assert "unknown settings ['pooling']" in refusal(capsys, *lexical, "--pooling", "cls")
    assert "of is 'passages'" in refusal(capsys, *lexical, "--losses", "[{name: flops, of: passages}]")
    apart = [*lexical, "--losses", "[contrastive, {name: flops, positives_apart: true}]", "--num_negatives", "0"]
    assert "there are no negatives" in refusal(capsys, *apart)
    inner = [*lexical, "--pooled_tokens", "inner", "--template", "{title}[SEP]{text}"]
    assert "cannot be expressed" in refusal(capsys, *inner)
    assert "either --data" in refusal(capsys, "pretrain", "--model", tiny_bert, *out)
    measured = ["pretrain", "--data", micro, "--model", "no/where", *out, "--eval_strategy", "steps"]
    assert "eval_strategy: pre-training measures nothing" in refusal(capsys, *measured)
    explain = ["explain", "--query", "x", "--passage", "y", "--model"]
    assert "write lexical: before the name of a bare SPLADE checkpoint" in refusal(capsys, *explain, tiny_bert)
    assert not (tmp_path / "out").exists()
