"""Job specs as the pictures that the engine makes, for every kind of condition, and what callers are told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from contract.card import ModelCard
from contract.spec import JobSpec, LayoutObject, Task
from models import layout
from models.weights_io.folder import save_folder
from tests.models.families import family
from worker.engine.engine import Engine
from worker.main import ModelFolderError, load, warm_up
from worker.requests import BadJobError, job_warnings, picture_requests, usual_request

MakeSpec = Callable[..., JobSpec]
OBJECT = LayoutObject(label=1, box=(0.0, 0.5, 0.5, 0.5), occluded=True)
MAP = Image.new("L", (64, 64), 3)


def card_of(conditioning: str, **changes: Any) -> ModelCard:
    fields: dict[str, Any] = {
        "name": "tiny", "tasks": ["txt2img"], "conditioning": conditioning, "default_width": 64, "default_height": 64,
        "max_width": 128, "max_height": 128, "size_multiple": 8, "latent_downsample": 4,
        "default_steps": {"txt2img": 2}, "default_guidance": {"txt2img": 1.0},
        "classes": {"class": 6, "layout": 4, "semantic": 7}.get(conditioning),
        "max_objects": 4 if conditioning == "layout" else None,
    }  # fmt: skip
    return ModelCard.model_validate(fields | changes)


def test_labels_layouts_and_maps_reach_the_engine(make_spec: MakeSpec) -> None:
    spec = make_spec(prompt="", class_label=3, n=2)
    assert [one.class_label for one in picture_requests(spec, card_of("class"), {})] == [3, 3]
    (laid,) = picture_requests(make_spec(prompt="", layout=(OBJECT,)), card_of("layout"), {})
    assert laid.layout == (layout.LayoutObject(1, (0.0, 0.5, 0.5, 0.5), occluded=True),)
    spec = make_spec(prompt="", inputs={"semantic_map": "inputs/j/semantic_map.png"})
    (mapped,) = picture_requests(spec, card_of("semantic"), {"semantic_map": MAP})
    assert mapped.semantic_map is MAP


@pytest.mark.parametrize(
    ("conditioning", "given", "takes"),
    [
        ("text", {"class_label": 3}, "a prompt"),
        ("none", {"prompt": "a face"}, "nothing that says what the picture shows"),
        ("class", {"prompt": "", "class_label": 3, "negative_prompt": "a dog"}, "a class_label from 0 to 5"),
        ("none", {"layout": (OBJECT,)}, "nothing that says what the picture shows"),
        ("class", {"layout": (OBJECT,)}, "a class_label from 0 to 5"),
        ("layout", {"class_label": 3}, "a layout of up to 4 objects with labels from 0 to 3"),
        ("semantic", {"class_label": 0}, "a semantic_map with classes from 0 to 6"),
    ],
)
def test_what_the_model_does_not_take_is_refused(
    make_spec: MakeSpec, conditioning: str, given: dict[str, Any], takes: str
) -> None:
    spec = make_spec(**{"prompt": "a" if conditioning == "text" else "", **given})
    with pytest.raises(BadJobError, match=f"tiny takes {takes}"):
        picture_requests(spec, card_of(conditioning), {})


@pytest.mark.parametrize(("name", "guides"), [("class", True), ("layout", False), ("celeba", False)])
def test_guidance_that_guides_nothing_is_a_warning(make_spec: MakeSpec, name: str, guides: bool) -> None:
    conditioner = family(name).conditioner
    card = card_of("none")
    warnings = job_warnings(make_spec(guidance_scale=3.0), card, conditioner)
    assert [warning.code for warning in warnings] == ([] if guides else ["ignored_field"])
    assert job_warnings(make_spec(guidance_scale=1.0), card, conditioner) == ()


@pytest.mark.parametrize(
    ("name", "conditioning"), [("class", "class"), ("layout", "layout"), ("semantic", "semantic"), ("celeba", "none")]
)
def test_every_kind_loads_from_its_folder_and_warms_up(name: str, conditioning: str, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    save_folder(family(name), folder)
    (folder / "card.json").write_text(card_of(conditioning).model_dump_json())
    served = load(folder)
    warm_up(Engine({"tiny": served.model}), {"tiny": served})
    assert served.model.render(usual_request(served.card)).size == (64, 64)
    wrong = json.loads((folder / "card.json").read_text()) | {"conditioning": "text", "classes": None}
    (folder / "card.json").write_text(json.dumps(wrong | {"max_objects": None}))
    with pytest.raises(ModelFolderError, match=f"conditioning=text; these weights want {conditioning}"):
        load(folder)


def test_specs_hold_the_map_with_txt2img_alone(make_spec: MakeSpec) -> None:
    with pytest.raises(ValueError, match="img2img takes the inputs: image; got: image, semantic_map"):
        make_spec(task=Task.IMG2IMG, inputs={"image": "a", "semantic_map": "b"})
    with pytest.raises(ValueError, match="txt2img takes the inputs: none or semantic_map; got: image"):
        make_spec(inputs={"image": "a"})


def test_cards_say_all_that_their_condition_needs() -> None:
    for conditioning, changes, message in (
        ("class", {"classes": None}, "classes: expected a number with conditioning=class"),
        ("text", {"classes": 5}, "classes: expected none with conditioning=text"),
        ("layout", {"max_objects": None}, "max_objects: expected a number with conditioning=layout"),
    ):
        with pytest.raises(ValueError, match=message):
            card_of(conditioning, **changes)
