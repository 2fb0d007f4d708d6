"""Encoders of LDM's conditions: its BERT-tokenised transformer against diffusers', class labels, layouts."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer, CLIPTextConfig, CLIPTokenizer

from models.bert import BertConfig, BertEncoder, BertTransformer
from models.class_label import ClassConfig, ClassEncoder
from models.config import UnsupportedStructure
from models.layout import LayoutConfig, LayoutEncoder, LayoutObject
from models.text import TextEncoder
from models.weights_io.files import Reading
from models.weights_io.tensors import WeightsError
from tests.models.small import diffusers, randomise, write_tokenizer

SMALL = {"encoder_layers": 2, "encoder_ffn_dim": 24, "encoder_attention_heads": 2, "head_dim": 3, "d_model": 8}
PROMPTS = ["a cat", "", "A Café, catdog! xyz", "cat " * 20]


@pytest.fixture(scope="module")
def bert_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizer:
    folder = tmp_path_factory.mktemp("wordpiece")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##dog", "cafe", "!", ","]
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))
    tokenizer: BertTokenizer = BertTokenizer.from_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def bert(bert_tokenizer: BertTokenizer) -> BertEncoder:
    config = BertConfig(vocab_size=len(bert_tokenizer), max_position_embeddings=12, **SMALL)
    encoder = BertEncoder(bert_tokenizer, BertTransformer(config))
    randomise(encoder)
    return encoder


def test_word_pieces_are_padded_and_cut(bert: BertEncoder) -> None:
    """[CLS] first, [SEP] last, then [PAD]; lower case, no accents; what is in no vocabulary is [UNK]."""
    assert bert.token_ids(["A Café, catdog! xyz"]).tolist() == [[2, 5, 8, 10, 6, 7, 9, 1, 3, 0, 0, 0]]
    assert bert.token_ids(["cat " * 20]).tolist() == [[2, *[6] * 10, 3]]
    assert bert.lost_words("cat " * 10 + "a cafe") == "a cafe"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_bert_context_is_that_of_diffusers(bert: BertEncoder, tmp_path: Path, prompt: str) -> None:
    """Theirs is read from the folder that ours writes, and pads as their pipeline does."""
    bert.save(tmp_path, torch.float32)
    latent_diffusion = diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion
    theirs = latent_diffusion.LDMBertModel.from_pretrained(tmp_path / "bert").eval()
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "tokenizer")
    ids = tokenizer(prompt, padding="max_length", max_length=12, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs(ids)[0]
    assert bert.encode(prompt).shape == (1, 12, bert.width)
    torch.testing.assert_close(bert.encode(prompt), expected, rtol=0, atol=5e-6)


def test_bert_folders_with_the_unused_head_are_read(bert: BertEncoder, tmp_path: Path) -> None:
    """As published: `to_logits` beside the transformer, the vocabulary in a text file."""
    bert.save(tmp_path, torch.float32)
    latent_diffusion = diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion
    latent_diffusion.LDMBertModel.from_pretrained(tmp_path / "bert").save_pretrained(tmp_path / "bert")
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    loaded = BertEncoder.load(tmp_path, Reading())
    for prompt in PROMPTS:
        assert torch.equal(loaded.encode(prompt), bert.encode(prompt))


def test_broken_bert_folders(bert: BertEncoder, tmp_path: Path) -> None:
    bert.save(tmp_path, torch.float32)
    shutil.copytree(tmp_path, tmp_path / "wordless")
    for name in ("tokenizer.json", "vocab.txt"):
        (tmp_path / "wordless" / "tokenizer" / name).unlink()
    with pytest.raises(WeightsError, match=r"vocab\.txt is missing"):
        BertEncoder.load(tmp_path / "wordless", Reading())
    config = tmp_path / "bert" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"vocab_size": 11', '"vocab_size": 10'))
    with pytest.raises(WeightsError, match="the tokenizer has 11 tokens, the transformer only 10"):
        BertEncoder.load(tmp_path, Reading())
    config.write_text(text.replace("{", '{"activation_function": "relu",', 1))
    with pytest.raises(UnsupportedStructure, match="activation_function='relu'"):
        BertEncoder.load(tmp_path, Reading())


def test_clip_pads_with_what_its_folder_says(tmp_path: Path) -> None:
    """SD 1 pads with the end token; the tokenizers of SD 2 with token 0, "!" there."""
    write_tokenizer(tmp_path / "tokenizer")
    config_file = tmp_path / "tokenizer" / "tokenizer_config.json"
    config_file.write_text(config_file.read_text().replace('"pad_token": "<|endoftext|>"', '"pad_token": "a"'))
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )
    encoder = TextEncoder.create(tokenizer, config).eval()
    encoder.save(tmp_path / "saved", torch.float32)
    loaded = TextEncoder.load(tmp_path / "saved", Reading())
    ids = loaded.token_ids(["dog"])[0].tolist()
    assert ids[:3] == [tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("dog</w>"), tokenizer.eos_token_id]
    assert ids[3:] == [0] * 9
    with torch.no_grad():
        assert torch.equal(loaded.encode("dog"), encoder.encode("dog"))


def test_a_class_is_one_token(tmp_path: Path) -> None:
    encoder = ClassEncoder(ClassConfig(num_classes=5, width=4, unconditional=4))
    encoder.save(tmp_path, torch.float32)
    loaded = ClassEncoder.load(tmp_path, Reading())
    assert loaded.config == encoder.config
    assert torch.equal(loaded.encode(3), encoder.embedding(torch.tensor([[3]])))
    assert (loaded.blank, loaded.learns_unconditional) == (4, True)
    assert not ClassEncoder(ClassConfig(num_classes=5, width=4, unconditional=None)).learns_unconditional
    for wrong in (5, -1, "a cat"):
        with pytest.raises(ValueError, match="expected 0 to 4"):
            loaded.encode(wrong)


@pytest.fixture(scope="module")
def layout() -> LayoutEncoder:
    """16 tokens: a grid of 4 x 4 corners; 3 classes, so that the token of none is 15."""
    config = BertConfig(vocab_size=16, max_position_embeddings=11, **SMALL)
    encoder = LayoutEncoder(LayoutConfig(num_classes=3, max_objects=3, transformer=config))
    randomise(encoder)
    return encoder


def test_layout_tokens(layout: LayoutEncoder) -> None:
    """The grid is the example in the original code: with 4 sections, x = 2/3 in row 1 is token 6, the last one 15."""
    box = (2 / 3, 1 / 3, 1 / 3, 2 / 3)
    assert layout.tokens([LayoutObject(2, box)]) == (2, 6, 15, *[15] * 6, 0, 15)
    assert layout.tokens([LayoutObject(1, (0.2, 0.45, 5.0, 0.1), group=True)])[:3] == (1 + 3, 5, 11)
    assert layout.tokens([LayoutObject(0, box, occluded=True, group=True)])[0] == 3 * 3
    assert layout.tokens([LayoutObject(1, box, depiction=True)])[0] == 1 + 3 * 4
    assert layout.blank == (*[15] * 9, 0, 15)


def test_the_published_layout_model() -> None:
    """8192 tokens: 90 x 90 corners, the last of them 8099; 30 objects and the crop make 92."""
    config = LayoutConfig()
    assert (config.none, config.sections, config.labels) == (8191, 90, 8191)
    encoder = LayoutEncoder(LayoutConfig(num_classes=300), BertTransformer(BertConfig(**SMALL)))
    tokens = encoder.tokens([LayoutObject(299, (0.0, 0.5, 0.5, 0.5), inside=True)])
    assert len(tokens) == 92
    assert tokens[:3] == (299 + 300 * 8, round(44.5) * 90, 89 * 90 + 44)
    assert tokens[-2:] == (0, 8099)


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ([LayoutObject(3, (0, 0, 1, 1))], "label 3; expected 0 to 2"),
        ([LayoutObject(2, (0, 0, 1, 1), inside=True)], "beyond this model's vocabulary"),
        ([LayoutObject(0, (0, 0, 0, 1))], "width and height above 0"),
        ([LayoutObject(0, (1.5, 0, 1, 1))], "x, y from 0 to 1"),
        ([LayoutObject(0, (0, 0, 1, 1))] * 4, "4 objects; expected at most 3"),
    ],
)
def test_layouts_that_cannot_be_told(layout: LayoutEncoder, objects: list[LayoutObject], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.tokens(objects)


def test_a_layout_model_of_unknown_classes_takes_plain_labels() -> None:
    encoder = LayoutEncoder(LayoutConfig(), BertTransformer(BertConfig(**SMALL)))
    assert encoder.tokens([LayoutObject(600, (0, 0, 1, 1))])[0] == 600
    with pytest.raises(ValueError, match="number of classes is unknown"):
        encoder.tokens([LayoutObject(6, (0, 0, 1, 1), group=True)])


def test_layout_context(layout: LayoutEncoder, tmp_path: Path) -> None:
    """That of the transformer over its tokens, also after saving."""
    layout.save(tmp_path, torch.float32)
    loaded = LayoutEncoder.load(tmp_path, Reading())
    assert loaded.config == layout.config
    tokens = layout.tokens([LayoutObject(1, (0, 0, 0.5, 0.5))])
    assert torch.equal(loaded.encode(tokens), layout.transformer(torch.tensor([tokens])))
    assert loaded.encode(tokens).shape == (1, 11, 8)
    with pytest.raises(ValueError, match="no 11 tokens"):
        loaded.encode(tokens[:-1])
