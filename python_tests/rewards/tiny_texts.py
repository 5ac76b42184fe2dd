"""A tiny text encoder and a tiny vision-language model on disk, of real classes, whose tokens are whole words."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

try:
    from transformers import CLIPImageProcessorPil as ClipProcessor
except ImportError:  # transformers 4
    from transformers import CLIPImageProcessor as ClipProcessor

WORDS = "what is going on in this image a an cat dog horse red blue green big small and the of ? : . ,".split()
# LLaVA's: the opening token, the image, the question, and who speaks next.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %} :"
)


def tokenizer(opening, closing, image=None):
    """Whole words; texts begin with `opening`, and end with `closing` where there is one."""
    special = ["<pad>", "<unk>", opening, "</s>" if closing is None else closing, *([image] if image else [])]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [opening, closing] if closing else [opening]
    words.post_processor = processors.TemplateProcessing(
        single=f"{opening} $A" + (f" {closing}" if closing else ""),
        special_tokens=[(token, vocabulary[token]) for token in ends],
    )
    return words, len(vocabulary)


def spread(model, scale):
    """Weights as large as a trained model's, so that outputs depend on inputs."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, scale)
    return model


def save_encoder(folder, kind="bert"):
    """A BERT with its pooler, or a RoBERTa that was saved without one, as the published ones are."""
    words, size = tokenizer("[CLS]", "[SEP]")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=words,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=16,
    )
    wrapped.save_pretrained(folder)
    shape = {
        "vocab_size": size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
        "pad_token_id": 0,
    }
    made = BertModel(BertConfig(**shape)) if kind == "bert" else RobertaForMaskedLM(RobertaConfig(**shape))
    spread(made, 0.3).save_pretrained(folder)
    return str(folder)


def save_vlm(folder):
    """A LLaVA that answers with a few words, which depend on the image."""
    words, size = tokenizer("<s>", None, image="<image>")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],
    )
    side = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        image_processor=ClipProcessor(size={"shortest_edge": 16}, crop_size=side),
        tokenizer=wrapped,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, image_size=16, patch_size=8, projection_dim=16),
        text_config=LlamaConfig(
            **shape, vocab_size=size, max_position_embeddings=64, bos_token_id=2, eos_token_id=3, pad_token_id=0
        ),
        image_token_index=4,
    )
    model = spread(LlavaForConditionalGeneration(config), 0.6)
    # Four image tokens among the question's ten would hardly be heard.
    spread(model.get_submodule("model.multi_modal_projector"), 3.0)
    model.save_pretrained(folder)
    return str(folder)
