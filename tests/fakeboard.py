"""A board that is a folder: the files that the agent reads, and stubs of the vendor commands that print what a test wants."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

BOARDS = Path(__file__).with_name("boards")


class FakeBoard:
    """The folder of one board; ``root`` is what the agent takes as ``/``."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder = folder
        self.root = str(folder)
        known = json.loads((BOARDS / f"{name}.json").read_text()) if name else {}
        for path, content in known.get("files", {}).items():
            self.write(path, content)
        for program, answers in known.get("commands", {}).items():
            for arguments, output in answers.items():
                self.answer(program, arguments, output)

    def path(self, path: str) -> Path:
        return self.folder / path.lstrip("/")

    def write(self, path: str, content: str | bytes) -> None:
        target = self.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)

    def remove(self, path: str) -> None:
        target = self.path(path)
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    def program(self, path: str, script: str) -> None:
        self.write(path, "#!/bin/sh\n" + script)
        self.path(path).chmod(0o755)

    def answer(self, program: str, arguments: str, output: str) -> None:
        """Let a stub print ``output`` for exactly these arguments, and fail for any that no test named."""
        answers = self.folder / "answers" / Path(program).name
        self.write(f"answers/{answers.name}/{arguments}", output)
        self.program(program, f'exec cat {shlex.quote(str(answers))}/"$*"\n')

    def throttled(self, bits: int) -> None:
        self.answer("/usr/bin/vcgencmd", "get_throttled", f"throttled={bits:#x}\n")

    def real_clock(self, hz: int) -> None:
        self.answer("/usr/bin/vcgencmd", "measure_clock arm", f"frequency(48)={hz}\n")

    def policy(self, number: int, name: str, value: object) -> None:
        self.write(f"/sys/devices/system/cpu/cpufreq/policy{number}/{name}", f"{value}\n")

    def busy_ticks(self, ticks: int) -> None:
        self.write("/proc/stat", f"cpu  {ticks} 0 0 900000 30 0 0 0 0 0\nintr 1\n")

    def own(self, pid: int, *, ticks: int = 0, faults: int = 0, born: int = 8000) -> None:
        """One of our processes, with a name that tries to break a parser."""
        fields = [
            "S",
            *["1", "1", "1", "0", "-1", "0", "900", "0"],
            str(faults),
            "0",
            str(ticks),
            "0",
        ]
        fields += [*["0", "0", "20", "0", "5", "0"], str(born), *(["0"] * 30)]
        self.write(f"/proc/{pid}/stat", f"{pid} (a) b (c) {' '.join(fields)}\n")
