"""A checkpoint packed under one line of Transformers, read under another. `.ci/run` calls this twice:

python tests/compat/cross_line.py write FOLDER    # under the oldest line
python tests/compat/cross_line.py check FOLDER    # under the newest
"""

import sys
from pathlib import Path

import torch
import transformers

from optimum_sab import AutoModelForVision2Seq, SABConfig, SABLinear
from optimum_sab.example import checkpoint_path


def outcome(model):
    """Packed tensors by module and name, and logits of a fixed text."""
    packed = {n: m.packed.tensors for n, m in model.named_modules() if isinstance(m, SABLinear)}
    with torch.no_grad():
        logits = model(input_ids=torch.arange(20, 60)[None]).logits
    return {"packed": packed, "logits": logits}


def main(action: str, folder: Path) -> None:
    if action == "write":
        config = SABConfig(calibration_samples=8, iterations=2, progress="none")
        model = AutoModelForVision2Seq.from_pretrained(
            checkpoint_path(), dtype=torch.float32, quantization_config=config
        )
        model.save_pretrained(folder)
        torch.save(outcome(model), folder / "outcome.pt")
        sys.stdout.write(f"written under transformers {transformers.__version__}\n")
        return
    written = torch.load(folder / "outcome.pt", weights_only=True)
    found = outcome(AutoModelForVision2Seq.from_pretrained(folder, dtype=torch.float32))
    if written["packed"].keys() != found["packed"].keys():
        raise SystemExit("other modules are packed")
    for name, tensors in written["packed"].items():
        for key, tensor in tensors.items():
            if not torch.equal(tensor, found["packed"][name][key]):
                raise SystemExit(f"{name}.{key} differs")
    torch.testing.assert_close(found["logits"], written["logits"], rtol=1e-4, atol=1e-4)
    sys.stdout.write(
        f"{len(written['packed'])} packed layers read alike under transformers {transformers.__version__}\n"
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
