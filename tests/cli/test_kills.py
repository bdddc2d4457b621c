"""Kill -9 at random moments of `optimum-sab quantize`.

With `--overwrite` the old checkpoint or the new one is there, every time; a resumed run gives what an undisturbed one
gives, every time.
"""

import json
import os
import subprocess
import sys

import pytest
import transformers
from packaging.version import Version

KILLS = 40
# A process of its own, which has everything imported and forks: a run is then the work and nothing else.
SCRIPT = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
from optimum_sab.cli.main import main

model, folder, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
output = folder / "out"
QUICK = ["--allocation", "uniform", "--calibration-samples", "4", "--sequence-length", "32", "--iterations", "2",
         "--sweeps", "0", "--no-temperature-scaling"]

def start(seed):
    child = os.fork()
    if child:
        return child
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os._exit(main(["quantize", model, "--output", str(output), "--overwrite", "--seed", str(seed), *QUICK]))

def without_times(found):
    if isinstance(found, dict):
        return {key: without_times(value) for key, value in found.items() if key != "seconds"}
    return [without_times(each) for each in found] if isinstance(found, list) else found

def content():
    if not output.exists():
        return None
    held = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in output.iterdir()}
    if "report.json" in held:  # no two runs take the same time
        held["report.json"] = without_times(json.loads((output / "report.json").read_text()))
        held["report.html"] = (output / "report.html").read_text().endswith("</html>")
    return held

def wait_for_saving(child):
    while not any((each / "new" / "config.json").exists() for each in folder.glob(".optimum-sab-*")):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.0005)

output.mkdir()
(output / "notes.txt").write_text("mine")
versions, seconds, saving = [], [], []
for seed in (0, 1):
    started = time.perf_counter()
    child = start(seed)
    wait_for_saving(child)
    begun = time.perf_counter()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    seconds.append(time.perf_counter() - started)
    saving.append(time.perf_counter() - begun)
    versions.append(content())
assert versions[0]["model.safetensors"] != versions[1]["model.safetensors"]
moments, found, finished = random.Random(14), [], 0
for kill in range(kills):
    before = versions.index(content())
    child = start(1 - before)
    if kill % 2:  # any moment of the run
        time.sleep(seconds[1] * moments.random())
    else:  # a moment from when it has begun to write
        wait_for_saving(child)
        time.sleep(1.5 * saving[1] * moments.random())  # what is new is put in its place at the very end
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    finished += code == 0
    now = content()
    found.append("old" if now == versions[before] else "new" if now == versions[1 - before] else "neither")
os.waitpid(start(0), 0)  # nobody disturbs this one
left = sorted(p.name for p in folder.iterdir())
print(json.dumps({"found": found, "finished": finished, "seconds": seconds, "saving": saving, "left": left,
                  "last": content() == versions[0], "notes": (output / "notes.txt").read_text()}))
"""


def told_by(script, model, folder, kills):
    """The last line that a script prints, which is JSON; shown as well."""
    command = [sys.executable, "-c", script, str(model), str(folder), str(kills)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    found = json.loads(done.stdout.splitlines()[-1])
    sys.stderr.write(f"{found}\n")
    return found


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_quantize_killed_at_random_moments_leaves_the_old_checkpoint_or_the_new(small_example, tmp_path):
    found = told_by(SCRIPT, small_example, tmp_path, KILLS)
    assert len(found["found"]) == KILLS
    assert set(found["found"]) == {"old", "new"}
    assert found["last"] and found["notes"] == "mine"
    assert found["left"][-1] == "out" and len(found["left"]) <= 1 + KILLS // 8  # those that were finished, if any


STREAMED_KILLS = 10
STREAMED = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
from optimum_sab.cli.main import main

model, folder, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
QUICK = ["--stream-weights", "--activation-memory", "0.00001", "--calibration-samples", "4", "--sequence-length", "32",
         "--iterations", "15", "--sweeps", "60"]

def start(name, *more):
    child = os.fork()
    if child:
        return child
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os._exit(main(["quantize", model, "--output", str(folder / name), *QUICK, *more]))

def code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def over(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

def content(name):
    files = (folder / name / each for each in ("model.safetensors", "config.json"))
    return [hashlib.sha256(each.read_bytes()).hexdigest() for each in files]

began = time.perf_counter()
assert code(start("undisturbed", "--resume-folder", str(folder / "kept"))) == 0
seconds = time.perf_counter() - began
moments, ends, same, blocks, attempts = random.Random(20), [], [], [], 0
while len(ends) < kills and attempts < 5 * kills:
    attempts += 1
    resume = folder / f"kept-{attempts}"
    began = time.perf_counter()
    child = start(f"out-{attempts}", "--resume-folder", str(resume))
    moment = seconds * (len(ends) + moments.random()) / kills  # one in every tenth of a run
    while time.perf_counter() - began < moment and not over(child):
        time.sleep(0.005)
    if over(child):  # before its moment: a later one is drawn from the time that this one took
        assert code(child) == 0
        seconds = time.perf_counter() - began
        continue
    os.kill(child, signal.SIGKILL)
    end = code(child)
    blocks.append(len(list(resume.glob("*.safetensors"))) if resume.exists() else 0)
    ends.append((end, code(start(f"out-{attempts}", "--resume-folder", str(resume)))))
    same.append(content(f"out-{attempts}") == content("undisturbed"))
left = [each.name for kind in ("activations", "scratch") for each in folder.rglob(f".optimum-sab-{kind}-*")]
print(json.dumps({"attempts": attempts, "ends": ends, "blocks": blocks, "same": same, "left": left}))
"""


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="refused by name there")
def test_streamed_run_killed_at_random_moments_goes_on_to_the_same_bytes(small_example, tmp_path):
    found = told_by(STREAMED, small_example, tmp_path, STREAMED_KILLS)
    assert len(found["same"]) == STREAMED_KILLS and all(found["same"])
    assert found["ends"] == [[-9, 0]] * STREAMED_KILLS and len(set(found["blocks"])) > 1  # before and behind a block
    assert not found["left"]
