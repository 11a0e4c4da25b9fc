"""DeepSpeed's launchers for many machines, mended where words or settings are lost on the way.

pdsh hands one line to a shell on each node, so every word is quoted for it; ending a launch there
ends that launch, not every launch of the same interpreter. mpirun and srun use no shell, so nothing
is quoted; they number the ranks themselves (`distributed.initialize` reads that), and are given the
address of rank 0, which DeepSpeed leaves to an MPI library. `install` puts these in DeepSpeed's
place; the runner chooses among them by `--launcher` as ever.
"""

import os
import shlex
import shutil
import sys
from argparse import Namespace
from typing import Any

from deepspeed.launcher import runner
from deepspeed.launcher.multinode_runner import OpenMPIRunner, PDSHRunner, SlurmRunner

# Beginnings of the names of variables that every node gets, beside those that DeepSpeed forwards
# (PYTHON…, NCCL…). No token: these words stand in the process list of every node.
FORWARDED = (
    "OMP_NUM_THREADS", "DS_ACCELERATOR", "DEEPSPEED_TIMEOUT", "GLOO_", "TORCH_NCCL_",
    "ALPACA_RLHF_", "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_", "XDG_CACHE_HOME",
)

# Programs that a launcher needs here, and the packages of Debian and Ubuntu that have them.
PROGRAMS = {"pdsh": {"pdsh": "pdsh", "ssh": "openssh-client"},
            "openmpi": {"mpirun": "openmpi-bin", "ompi_info": "openmpi-bin"},
            "slurm": {"srun": "slurm-client", "sinfo": "slurm-client"}}


def remote(word: str) -> str:
    """A word for the remote shell; pdsh itself reads % as the start of a placeholder."""
    return shlex.quote(word).replace("%", "%%")


class Pdsh(PDSHRunner):
    """One line for the shell of each node."""

    def add_export(self, key: str, var: str) -> None:
        """Set a variable on every node."""
        self.exports[key.strip()] = remote(var.strip())

    def parse_user_args(self) -> list[str]:
        """The script's flags."""
        return [remote(word) for word in self.args.user_args]

    def get_cmd(
        self, environment: dict[str, str], active_resources: dict[str, list[int]]
    ) -> tuple[list[str], list[str], dict[str, str]]:
        """The command that starts the workers, the one that ends them, and their environment."""
        self.user_script = remote(self.args.user_script)
        self.exports["PATH"] = remote(os.path.dirname(sys.executable)) + ':"$PATH"'
        command, kill, environment = super().get_cmd(environment, active_resources)
        here = os.path.abspath(".")
        bare = {f"cd {here};": f"cd {remote(here)};", sys.executable: remote(sys.executable)}
        # The brackets keep the pattern from matching the line that it stands in.
        pattern = (f"deepspeed.launcher.launc[h] --world_info={self.world_info_base64} "
                   f".*--master_port={self.args.master_port}")
        # Of the runner's flags this one alone does not reach the launchers.
        place = command.index(f"--master_port={self.args.master_port}")
        command.insert(place, f"--log_level={self.args.log_level}")
        return [bare.get(word, word) for word in command], [
            *kill[:-2], f"pkill -f {remote(pattern)}"], environment


def rendezvous(args: Namespace) -> dict[str, str]:
    """Where rank 0 listens, for ranks that no launcher of DeepSpeed's own starts."""
    return {"MASTER_ADDR": args.master_addr, "MASTER_PORT": str(args.master_port)}


class OpenMpi(OpenMPIRunner):
    """Words of mpirun."""

    exports: dict[str, str]

    def __init__(self, args: Namespace, *rest: Any) -> None:
        super().__init__(args, *rest)
        self.exports |= rendezvous(args)

    def add_export(self, key: str, var: str) -> None:
        """Set a variable on every node."""
        self.exports[key.strip()] = var.strip()


class Slurm(SlurmRunner):
    """Words of srun, which hands on its whole environment, commas and all."""

    exports: dict[str, str]

    def add_export(self, key: str, var: str) -> None:
        """Set a variable on every node."""
        self.exports[key.strip()] = var.strip()

    def get_cmd(
        self, environment: dict[str, str], active_resources: dict[str, list[int]]
    ) -> list[str]:
        """The command that starts the workers; its variables go into `environment`."""
        environment.update(self.exports, **rendezvous(self.args))
        self.exports = {}
        return super().get_cmd(environment, active_resources)


def install() -> None:
    """Let DeepSpeed's runner use these."""
    runner.PDSHRunner, runner.OpenMPIRunner, runner.SlurmRunner = Pdsh, OpenMpi, Slurm
    runner.EXPORT_ENVS = [*dict.fromkeys([*runner.EXPORT_ENVS, *FORWARDED])]


def describe(options: Namespace) -> tuple[list[str], dict[str, int]]:
    """What the flags of a launch over the hosts of `--hostfile` leave open.

    Args:
        options: the runner's flags, parsed.

    Returns:
        Flags for the runner, and the slots of each host.

    Raises:
        ValueError: the hostfile is broken, `--no_ssh` lacks what each node must be told, or the
            launcher is not installed.
    """
    hosts = dict(runner.fetch_hostfile(options.hostfile))
    if options.no_ssh and not (options.master_addr and 0 <= options.node_rank < len(hosts)):
        raise ValueError(
            "--no_ssh: start it on every node, with --master_addr ADDRESS (of the first host) and "
            f"--node_rank N (0 to {len(hosts) - 1}, its place in {options.hostfile})"
        )
    if not options.no_ssh and (len(hosts) > 1 or options.force_multi):
        for program, package in PROGRAMS.get(options.launcher.lower(), {}).items():
            if shutil.which(program) is None:
                raise ValueError(
                    f"--launcher {options.launcher}: there is no {program} here; install it "
                    f"(Debian and Ubuntu: apt-get install {package}), or start each node by itself "
                    "with --no_ssh")
    flags = []
    if options.launcher.lower() in ("openmpi", "slurm"):
        # Neither needs ssh to all nodes, by which the runner would ask the first for its address.
        flags.append("--no_ssh_check")
        if not options.master_addr:
            flags.append(f"--master_addr={next(iter(hosts))}")
    return flags, hosts
