"""Reports made by hand, and one of a real run."""

import base64
import copy
import io

import pytest

from optimum_sab.cli.main import main
from optimum_sab.report.files import REPORT_VERSION


def png(size=(8, 6), colour="red"):
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def block(index):
    layers = [
        {
            "name": f"layers.{index}.q_proj",
            "error": 0.1,
            "by_modality": {"text": 0.2, "visual": 0.1},
            "bits_per_weight": 1.3,
            "weights": 4096,
        }
    ]
    return {
        "index": index,
        "error": 0.1 + 0.01 * index,
        "by_modality": {"text": 0.2, "visual": 0.1 + 0.02 * index},
        "drift": 0.05 * (index + 1),
        "bits_per_weight": 1.3,
        "seconds": 1.5,
        "significance": {"ratio": 0.3, "spatial": 0.02},
        "reconstruction": None,
        "layers": layers,
    }


DOCUMENT = {
    "report_version": REPORT_VERSION,
    "about": {
        "model": "me/a-model",
        "class": "SomeForConditionalGeneration",
        "model_type": "some",
        "dtype": "bfloat16",
        "settings": {"calibration_samples": 8},
        "rules": 0,
        "left_dense": [],
        "versions": {"optimum-sab": "1.0", "torch": "2.0"},
    },
    "verdict": {
        "level": "care",
        "words": "usable with care",
        "kind": "text",
        "reason": "on text",
        "advice": "Try.",
    },
    "limits": {"text": {"close_kl": 0.1, "close_top1": 0.8, "far_kl": 1.0}},
    "agreement": {"text": {"kl": 0.375, "top1": 0.695}, "pictures": {"kl": 0.151, "top1": 0.712}},
    "examples": [
        {
            "kind": "text",
            "prompt": "Once upon",
            "expected": "a time",
            "picture": "",
            "dense": "a day",
            "packed": "a",
        },
        {
            "kind": "pictures",
            "prompt": "What colour?",
            "expected": "red",
            "picture": png(),
            "dense": "red",
            "packed": "blue",
        },
    ],
    "no_examples": None,
    "bits_per_weight": 1.3,
    "blocks": [block(0), block(1), block(2)],
    "sizes": {
        "total": 3000,
        "total_before": 9000,
        "packed": 1000,
        "packed_before": 7000,
        "kinds": {"q_proj": {"linears": 3, "weights": 12288, "bytes": 1000, "bits_per_weight": 1.3}},
        "planes": {"1": {"linears": 3, "weights": 12288, "bytes": 1000, "bits_per_weight": 1.3}},
        "tensors": {"weight": 900, "row_scale": 100},
        "dense": {"token embedding": 2000},
    },
    "stages": [{"name": "samples", "seconds": 0.5}, {"name": "blocks", "seconds": 75.0}],
    "seconds": 75.5,
    "calibration": {
        "count": 8,
        "tokens": {"text": 1200, "visual": 300},
        "with_pictures": 4,
        "source": "builtin",
        "sequence_length": 256,
        "seed": 0,
    },
    "temperature": None,
    "tuning": None,
    "warnings": ["something was so"],
}


@pytest.fixture
def document():
    """What a report.json holds, to be changed at will."""
    return copy.deepcopy(DOCUMENT)


HOSTILE = (
    "<script>alert(1)</script><img src=http://127.0.0.1/x onerror=alert(2)>\"'>&</style></title></svg>"
    "<script>console.error(3)</script><svg onload=console.error(4)>"
)


@pytest.fixture
def hostile(document):
    """A report in which every text that is not ours is markup: what a model wrote, names of files and modalities."""

    def spoil(value):
        if isinstance(value, dict):
            return {key: spoil(each) for key, each in value.items()}
        if isinstance(value, list):
            return [spoil(each) for each in value]
        return HOSTILE if isinstance(value, str) and value else value

    kept = [each["picture"] for each in document["examples"]]
    spoiled = spoil(document)
    for example, picture in zip(spoiled["examples"], kept, strict=True):
        example["picture"] = picture
    for of in (spoiled["sizes"], *spoiled["blocks"]):  # names that become labels in pictures
        for name in ("dense", "tensors", "kinds", "planes", "by_modality"):
            if name in of:
                of[name] = {HOSTILE: next(iter(of[name].values()))}
    spoiled["agreement"] = {HOSTILE: document["agreement"]["text"]}
    spoiled["calibration"]["tokens"] = {HOSTILE: 3}
    spoiled["about"]["settings"] = {HOSTILE: HOSTILE}
    spoiled["verdict"]["level"] = '" onload="alert(3)'
    spoiled["about"]["versions"] = document["about"]["versions"]
    spoiled["report_version"] = REPORT_VERSION
    return spoiled


@pytest.fixture(scope="session")
def reported(smallest_example, tmp_path_factory):
    """The folder that `optimum-sab quantize` has written with few samples."""
    folder = tmp_path_factory.mktemp("reported") / "packed"
    quick = ["--calibration-samples", "8", "--sequence-length", "64", "--iterations", "2", "--sweeps", "0"]
    arguments = ["quantize", str(smallest_example), "--output", str(folder), "--allocation", "uniform", *quick]
    assert main(arguments) == 0
    return folder
