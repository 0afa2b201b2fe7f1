"""Students cut from a teacher: which layers, and that the cut model is a sound checkpoint of its family."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_distill.errors import InputError
from hf_distill.models import (
    CrossEncoderRanker,
    DenseRetriever,
    layer_positions,
    load_model,
    reduce_layers,
    student_from,
)

from .model_zoo import PAIRS, TEXTS, pair_scores, save_tiny, tokenizer_for, vectors


@given(st.integers(1, 60), st.integers(1, 60))
def test_positions(count, total):
    if count > total:
        count, total = total, count
    assert layer_positions(count, total, "first") == list(range(total))[:count]
    assert layer_positions(count, total, "last") == list(range(total))[-count:]
    even = layer_positions(count, total, "even")
    assert len(set(even)) == count and even == sorted(even) and 0 <= even[0] and even[-1] < total
    if count > 1:
        assert (even[0], even[-1]) == (0, total - 1)
        gaps = {right - left for left, right in zip(even, even[1:])}
        assert max(gaps) - min(gaps) <= 1


def test_positions_of_usual_teachers():
    assert layer_positions(3, 6, "even") == [0, 3, 5]
    assert layer_positions(6, 12, "even") == [0, 2, 4, 7, 9, 11]
    assert layer_positions(12, 24, "even")[-1] == 23


FAMILIES = ["bert", "roberta", "distilbert", "modernbert", "llama", "qwen2", "gpt2"]
LAYERS = {"distilbert": "transformer.layer", "modernbert": "layers", "llama": "layers", "qwen2": "layers", "gpt2": "h"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_backbone_computes_what_its_layers_would(tmp_path, tiny_tokenizer, family):
    """Against the teacher itself, whose other layers are made to do nothing."""
    teacher = DenseRetriever.from_pretrained(save_tiny(tmp_path / family, family, tokenizer_for(tiny_tokenizer)))
    student = student_from("layers:2:even", teacher)
    assert student.backbone.config.num_hidden_layers == 2
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in teacher.parameters())
    layers = teacher.get_submodule("backbone." + LAYERS.get(family, "encoder.layer"))
    kept = torch.nn.ModuleList([layers[0], layers[3]])
    if family in ("llama", "qwen2", "gpt2"):
        # The cut model numbers its layers anew; without a cache the numbers change nothing.
        assert [module.layer_idx for module in student.modules() if hasattr(module, "layer_idx")]
    owner = teacher.get_submodule(("backbone." + LAYERS.get(family, "encoder.layer")).rpartition(".")[0])
    setattr(owner, LAYERS.get(family, "encoder.layer").rpartition(".")[2], kept)
    for name in ("num_hidden_layers", "n_layer"):
        if hasattr(teacher.backbone.config, name):
            setattr(teacher.backbone.config, name, 2)
    torch.testing.assert_close(vectors(student, TEXTS, "query"), vectors(teacher, TEXTS, "query"))
    student.save_pretrained(tmp_path / "student")
    again = load_model(tmp_path / "student")
    torch.testing.assert_close(vectors(again, TEXTS, "query"), vectors(student, TEXTS, "query"))


def test_settings_by_layer_follow_their_layers(tmp_path, tiny_tokenizer):
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    folder = save_tiny(
        tmp_path / "qwen", "qwen2", tokenizer_for(tiny_tokenizer), layer_types=kinds, use_sliding_window=True,
        sliding_window=4, max_window_layers=0,
    )  # fmt: skip
    student = student_from("layers:2:last", folder)
    assert student.backbone.config.layer_types == kinds[2:]
    reduced = reduce_layers(load_model(folder), [1, 3])
    assert reduced.backbone.config.layer_types == ["full_attention"] * 2


def test_the_teachers_ways_are_kept(tmp_path, tiny_tokenizer):
    source = save_tiny(tmp_path / "bert", "bert", tiny_tokenizer)
    settings = {"pooling": "cls", "normalize": True, "query_prompt": "q: ", "passage_prompt": "p: ", "query_length": 9}
    teacher = DenseRetriever.from_pretrained(source, projection_dim=8, **settings)
    teacher.save_pretrained(tmp_path / "teacher")
    for student in (student_from("layers:2", teacher), student_from("layers:2", tmp_path / "teacher")):
        assert {key: getattr(student.config, key) for key in settings} == settings
        assert torch.equal(student.projections[0].weight, teacher.projections[0].weight)
        assert student.processor().settings() == teacher.processor().settings()
        assert all(p.requires_grad for n, p in student.named_parameters() if "pooler" not in n)
        assert student.backbone.encoder.layer[0] is not teacher.backbone.encoder.layer[0]
    assert len(teacher.backbone.encoder.layer) == 4
    assert student_from("layers:4", teacher).weights_fingerprint() == teacher.weights_fingerprint()
    assert student_from("layers:1", tmp_path / "teacher", query_prompt="other: ").config.query_prompt == "other: "


def test_frozen_bfloat16_teachers_give_trainable_float32_students(tmp_path, tiny_tokenizer):
    teacher = load_model(save_tiny(tmp_path / "bert", "bert", tiny_tokenizer), dtype="bfloat16").requires_grad_(False)
    student = student_from("layers:2:last", teacher)
    assert student.dtype == torch.float32
    assert all(p.requires_grad for n, p in student.named_parameters() if "pooler" not in n)


def test_two_towers_and_rankers_are_cut_too(tmp_path, tiny_tokenizer):
    source = save_tiny(tmp_path / "bert", "bert", tiny_tokenizer)
    student = student_from("layers:3:last", DenseRetriever.from_pretrained(source, tied=False))
    assert [len(tower.encoder.layer) for tower in student.towers.values()] == [3, 3]
    ranker = save_tiny(tmp_path / "ranker", "bert", tiny_tokenizer, head="SequenceClassification", num_labels=1)
    small = student_from("layers:2", ranker)
    assert isinstance(small, CrossEncoderRanker) and len(small.backbone.bert.encoder.layer) == 2
    small.save_pretrained(tmp_path / "small")
    torch.testing.assert_close(pair_scores(load_model(tmp_path / "small"), PAIRS), pair_scores(small, PAIRS))


def test_a_pooler_beside_the_encoder_belongs_to_the_head(tmp_path, tiny_tokenizer):
    source = save_tiny(
        tmp_path / "ranker", "deberta", tokenizer_for(tiny_tokenizer), head="SequenceClassification", num_labels=1
    )
    small = student_from("layers:2", source)
    assert len(small.backbone.deberta.encoder.layer) == 2
    assert all(parameter.requires_grad for parameter in small.backbone.pooler.parameters())
    before = small.weights_fingerprint()
    with torch.no_grad():
        small.backbone.pooler.dense.weight.zero_()
    assert small.weights_fingerprint() != before


def test_any_other_model_is_opened_as_it_is(tmp_path, tiny_tokenizer):
    source = save_tiny(tmp_path / "bert", "bert", tiny_tokenizer)
    student = student_from(source, query_length=7)
    assert student.config.query_length == 7
    assert student.weights_fingerprint() == load_model(source).weights_fingerprint()


@pytest.mark.parametrize("spec", ["layers:", "layers:0", "layers:x", "layers:2:middle", "layers:2:last:more"])
def test_choices_that_make_no_sense(tmp_path, spec):
    with pytest.raises(InputError, match="no choice of layers.*layers:3:even"):
        student_from(spec, tmp_path)


def test_cuts_that_cannot_be_made(tmp_path, tiny_tokenizer):
    bert = save_tiny(tmp_path / "bert", "bert", tiny_tokenizer)
    with pytest.raises(InputError, match="no teacher"):
        student_from("layers:2")
    with pytest.raises(InputError, match="the teacher has 4 layers"):
        student_from("layers:5", bert)
    with pytest.raises(InputError, match="layers 0 to 3"):
        reduce_layers(load_model(bert), [2, 4])
    with pytest.raises(InputError, match="pooling cannot be set"):
        student_from("layers:2", load_model(bert), pooling="cls")
    assert student_from("layers:2", load_model(bert), template="{text}").processor().template == "{text}"
    albert = save_tiny(tmp_path / "albert", "albert", tokenizer_for(tiny_tokenizer))
    with pytest.raises(InputError, match="may share them"):
        student_from("layers:2", albert)
    t5 = save_tiny(tmp_path / "t5", "t5", tokenizer_for(tiny_tokenizer))
    assert len(student_from("layers:2", t5).backbone.encoder.block) == 2
    with pytest.raises(InputError, match="no complete backbone"):
        student_from("layers:2:last", t5)


def test_layers_by_number(tiny_bert):
    teacher = DenseRetriever.from_pretrained(tiny_bert)
    student = student_from("layers:1,4", tiny_bert)
    for ours, theirs in zip(student.backbone.encoder.layer, (0, 3)):
        expected = teacher.backbone.encoder.layer[theirs].state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    assert student.backbone.config.num_hidden_layers == 2
    for wrong in ("layers:4,1", "layers:1,1", "layers:0,2", "layers:1,2:even", "layers:a,b", "layers:1,5"):
        with pytest.raises(InputError, match="layers"):
            student_from(wrong, tiny_bert)
