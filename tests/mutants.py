"""Break a module in one small way at a time, with cosmic-ray and in a copy of the last commit: what does no test see?

Every place where there can be a fault has one, and a sample of the places is tried, the same for the same seed; the
faults that survived are shown. Stopped, the same command goes on. Left out are type hints (``int | None``), bit
operators for arithmetic, which fail at once on a float, and ``is`` for ``==``, which small numbers and names do not
tell apart. What runs out of time counts as found, so there is much of it: a busy machine finds no fault.
"""

import random
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """[cosmic-ray]
module-path = "lib/unravelling/{module}.py"
timeout = 1200
test-command = "{python} -m pytest -x -q -p no:cacheprovider tests/test_{module}.py {others}"
distributor.name = "local"
"""
DOOR = "tests/test_door.py::test_arguments_that_make_no_sense"
ALSO = {"paths": "tests/test_every_path.py", "chain": "tests/test_paths.py"}  # where more of a module is tested
LEFT_OUT = re.compile("BinaryOperator_(BitOr_.*|.*_(RShift|LShift|BitXor|BitOr|BitAnd))$|_Eq_Is$|_NotEq_IsNot$")


def choose(session: Path, sample: int, seed: int) -> None:
    """Leave ``sample`` faults in a session of cosmic-ray, each in a place of its own."""
    with sqlite3.connect(session) as table:
        columns = "start_pos_row, start_pos_col, operator_name, occurrence, job_id"
        faults = sorted(table.execute(f"select {columns} from mutation_specs"))
        faults = [fault for fault in faults if not LEFT_OUT.search(fault[2])]
        random.Random(seed).shuffle(faults)
        chosen = list({fault[:2]: fault[4] for fault in faults}.values())[:sample]
        for name in ("work_items", "mutation_specs"):
            table.execute(f"delete from {name} where job_id not in ({','.join('?' * len(chosen))})", chosen)


def main(module: str = "stats", sample: str = "60", seed: str = "12") -> None:
    """Try the faults in ``_build/mutants/<module>-<seed>``."""
    folder, run = ROOT / f"_build/mutants/{module}-{seed}", subprocess.check_call
    others = f"{ALSO.get(module, '')} {DOOR}"
    cosmic_ray = [sys.executable, "-m", "cosmic_ray.cli"]
    if not (folder / "session.sqlite").exists():
        folder.mkdir(parents=True, exist_ok=True)
        run(f"git archive HEAD | tar -x -C '{folder}'", shell=True, cwd=ROOT)
        (folder / "config.toml").write_text(CONFIG.format(module=module, python=sys.executable, others=others))
        run([*cosmic_ray, "init", "config.toml", "new.sqlite"], cwd=folder)
        choose(folder / "new.sqlite", int(sample), int(seed))
        (folder / "new.sqlite").rename(folder / "session.sqlite")
    run(["env", f"PYTHONPATH={folder}/lib", "PYTHONDONTWRITEBYTECODE=1", "OMP_NUM_THREADS=1",
         *cosmic_ray, "exec", "config.toml", "session.sqlite"], cwd=folder)  # fmt: skip
    run([Path(sys.executable).with_name("cr-report"), "--surviving-only", "--show-diff", "session.sqlite"], cwd=folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
