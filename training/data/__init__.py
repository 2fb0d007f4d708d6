"""The picture program: emoji and plain shapes on coloured backgrounds, with captions from a small grammar."""

from training.data.captions import caption, plain_caption
from training.data.dataset import PictureDataset, example, generate, write_dataset
from training.data.render import Picture, object_box, object_boxes, render
from training.data.scenes import Item, Scene, plain_scene, sample_scene
from training.data.vocabulary import (
    COLOURS,
    EMOJI,
    OBJECTS,
    POSITIONS,
    SHAPES,
    STYLES,
    held_out_pairs,
    is_held_out,
    seen_pairs,
)

__all__ = [
    "COLOURS",
    "EMOJI",
    "OBJECTS",
    "POSITIONS",
    "SHAPES",
    "STYLES",
    "Item",
    "Picture",
    "PictureDataset",
    "Scene",
    "caption",
    "example",
    "generate",
    "held_out_pairs",
    "is_held_out",
    "object_box",
    "object_boxes",
    "plain_caption",
    "plain_scene",
    "render",
    "sample_scene",
    "seen_pairs",
    "write_dataset",
]
