"""The CUDA test programs, compiled beside the other tests: it takes minutes, and most tests leave a core idle."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90")


class CudaBuild:
    """A build of ``cuda/`` with all kernels for ARCHITECTURES in ``folder``, which begins at once, in the background."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = folder / "build.log"
        architectures = ";".join(a + "-real" for a in ARCHITECTURES)
        configure = ["cmake", "-S", str(ROOT / "cuda"), "-B", str(folder), "-DMILLION_CUDA=ON"]
        configure += [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_CUDA_ARCHITECTURES={architectures}",
            "-DCMAKE_CUDA_FLAGS=-Xptxas=-v",
        ]
        compile_ = ["cmake", "--build", str(folder), "-j", str(min(4, os.cpu_count() or 1))]
        compile_ += ["--target", "pq-cuda-test", "pq-cuda-codec-test"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["nice", "-n", "19", "sh", "-c", f"{shlex.join(configure)} && exec {shlex.join(compile_)}"],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @staticmethod
    def missing() -> str | None:
        """The tool without which there is nothing to build."""
        return next((tool for tool in ("nvcc", "cmake", "nice") if shutil.which(tool) is None), None)

    def finish(self, timeout: float) -> str:
        """Waits for the end, and returns what the compilers said.

        Raises:
            AssertionError: the build failed.
            subprocess.TimeoutExpired: it is not done after ``timeout`` seconds.
        """
        code = self._process.wait(timeout)
        log = self._log.read_text(errors="replace")
        assert code == 0, log[-4000:]
        return log

    def stop(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait()
