"""BERTScore's recall against a slow computation of one text at a time."""

import pytest
import tiny_texts
import torch
from transformers import AutoTokenizer, BertModel, RobertaModel

from rftcore.rewards import RewardSpecError
from rftcore.rewards.text_similarity import TextSimilarity

SAID = ["a big red cat .", "the dog and the horse", "a cat", "what"]
ASKED = ["a cat", "a small blue horse in the image", "a cat", "an ? : , . green dog of the cat and a horse"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    torch.manual_seed(0)
    return tiny_texts.save_encoder(tmp_path_factory.mktemp("bert"))


def slow_recall(folder, kind, layer, said, asked):
    """In fp64, without a batch, padding or masks: every token of the prompt against every one of the answer."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), kind.from_pretrained(folder).double().eval()

    def states(text):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return model(ids, output_hidden_states=True).hidden_states[layer][0]

    candidate, reference = states(said), states(asked)[1:-1]
    best = [max(torch.cosine_similarity(token, other, dim=0).item() for other in candidate) for token in reference]
    return sum(best) / len(best)


@pytest.mark.parametrize("layer", [0, 2])
def test_recall_is_the_slow_computation(bert, layer):
    scores = TextSimilarity(bert, layer).recall(SAID, ASKED)
    expected = [slow_recall(bert, BertModel, layer, *pair) for pair in zip(SAID, ASKED, strict=True)]
    torch.testing.assert_close(scores.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
    assert scores[2] == pytest.approx(1.0, abs=1e-6)
    assert len({round(score, 3) for score in expected}) > 2


def test_encoder_that_was_saved_without_a_pooler(tmp_path):
    folder = tiny_texts.save_encoder(tmp_path, "roberta")
    scores = TextSimilarity(folder, 3).recall(SAID, ASKED)
    expected = [slow_recall(folder, RobertaModel, 3, *pair) for pair in zip(SAID, ASKED, strict=True)]
    torch.testing.assert_close(scores.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)


def test_empty_texts_score_nothing(bert):
    similarity = TextSimilarity(bert, 2)
    assert similarity.recall(["", "a cat", " "], ["a cat", "", ""]).tolist() == [0, 0, 0]
    assert similarity.recall(["the cat", ""], ["a cat", "a cat"])[0] > 0


def test_prompts_are_encoded_once_and_not_without_end(bert, monkeypatch):
    similarity, passes = TextSimilarity(bert, 2), []
    similarity.encoder.register_forward_hook(lambda module, inputs, output: passes.append(1))
    monkeypatch.setattr("rftcore.rewards.text_similarity._REMEMBERED", 2)
    first = similarity.recall(SAID, ASKED)
    assert len(passes) == 2
    torch.testing.assert_close(similarity.recall(["a cat"], ASKED[-1:]), similarity.recall(["a cat"], ASKED[-1:]))
    assert len(passes) == 4
    assert len(similarity._known) == 2
    torch.testing.assert_close(similarity.recall(SAID, ASKED), first)


def test_a_text_that_is_too_long_is_cut(bert):
    similarity = TextSimilarity(bert, 2)
    longest = " ".join(["cat"] * 14)
    torch.testing.assert_close(
        similarity.recall(["a dog"], [longest + " red horse"]), similarity.recall(["a dog"], [longest])
    )


def test_scores_are_fp32_under_the_caller_s_autocast(bert):
    similarity = TextSimilarity(bert, 2)
    expected = similarity.recall(SAID, ASKED)
    similarity = TextSimilarity(bert, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(similarity.recall(SAID, ASKED), expected)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (None, r"set similarity_layer \(known: .*deberta-xlarge-mnli 40"),
        (4, "has 3 layers, and the layer 4"),
        (-1, "layer -1"),
    ],
)
def test_layers_that_are_not_there(bert, layer, message):
    with pytest.raises(RewardSpecError, match=message):
        TextSimilarity(bert, layer)


def test_layer_by_the_name_of_the_model(tmp_path):
    folder = tmp_path / "roberta-base"
    tiny_texts.save_encoder(folder)
    with pytest.raises(RewardSpecError, match="has 3 layers, and the layer 10"):
        TextSimilarity(str(folder))


def test_no_model_there(tmp_path):
    with pytest.raises(RewardSpecError, match="cannot load similarity="):
        TextSimilarity(str(tmp_path / "none"), 2, option="similarity")
