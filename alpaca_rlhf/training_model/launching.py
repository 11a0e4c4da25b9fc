"""Launch decisions that DeepSpeed's launcher leaves open: port, devices, cores, several hosts.

For several hosts the launcher's commands are completed, because words and settings get lost on the
way. pdsh hands one line to a shell on each host, so every word is quoted for it, and ending a
launch ends that launch, not every launch of the same interpreter. mpirun and srun use no shell;
they number the ranks themselves, which `distributed.initialize` reads, and are given the address of
rank 0, which DeepSpeed leaves to an MPI library.
"""

import importlib.util
import os
import random
import shlex
import shutil
import socket
import sys
from argparse import Namespace
from types import ModuleType

from deepspeed.accelerator import get_accelerator
from deepspeed.launcher import runner
from deepspeed.launcher.multinode_runner import OpenMPIRunner, PDSHRunner, SlurmRunner

from alpaca_rlhf.utils import distributed

# Below the range from which the kernel serves outgoing connections: no other program is given such
# a port in the seconds between this check and the moment when rank 0 listens on it.
PORTS = range(20_000, 32_000)
NO_SSH_PORT = 29_500  # hosts that are started one by one must agree without communicating
DEFAULT_HOSTFILE = "/job/hostfile"  # the runner's; it need not exist
NAMED = ("GPU-", "MIG-")  # prefixes of devices that are named, not numbered

# Programs that a launcher needs on this host, and their packages in Debian and Ubuntu.
PROGRAMS = {"pdsh": {"pdsh": "pdsh", "ssh": "openssh-client"},
            "openmpi": {"mpirun": "openmpi-bin", "ompi_info": "openmpi-bin"},
            "slurm": {"srun": "slurm-client", "sinfo": "slurm-client"}}

# Prefixes of the variables that every host gets, besides DeepSpeed's own (PYTHON, NCCL, ...). No
# token: the process list of every host shows these values.
FORWARDED = (
    "OMP_NUM_THREADS", "DS_ACCELERATOR", "GLOO_", "TORCH_NCCL_", "ALPACA_RLHF_", "HF_HOME",
    "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_", "XDG_CACHE_HOME",
)


def is_free(port: int) -> bool:
    """Return whether rank 0 could listen on `port` of this host now."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


def choose_port(asked: int) -> int:
    """Return the port asked for (0: none) if it is free, else a free one.

    It is drawn at random, so that two launches at the same time use different ports.
    """
    candidates = random.SystemRandom().sample(PORTS, 100)
    return next(port for port in [asked, *candidates] if port and is_free(port))


def choose(options: Namespace) -> tuple[list[str], str]:
    """Choose hosts, devices, cores and port for the runner's options.

    Returns:
        Flags for the runner, to follow the user's, and the text of the start-up line.

    Raises:
        ValueError: flags that cannot be followed, in one line.
    """
    if os.path.isfile(options.hostfile):
        return choose_hosts(options)
    if options.hostfile != DEFAULT_HOSTFILE:
        raise ValueError(f"--hostfile {options.hostfile}: no such file")
    if options.no_ssh:
        raise ValueError("--no_ssh: needs --hostfile FILE, the same on every node")
    if distributed.on_cpu():
        # The runner would read it as a list of CPUs.
        visible = os.environ.pop("CUDA_VISIBLE_DEVICES", "")
        if visible.startswith(NAMED) and "DS_ACCELERATOR" not in os.environ:
            raise ValueError(f"CUDA_VISIBLE_DEVICES={visible}: there is no such device here (see "
                             "nvidia-smi -L); unset it to use the CPU")
        ranks = max(1, options.num_gpus)
        # Left alone, the runner would start one rank per NUMA node.
        flags = [] if options.include or options.exclude else [f"--num_gpus={ranks}"]
        text = f"{ranks} rank(s) on the CPU, {share_cores(ranks)}"
    else:
        flags, text = choose_devices(options, get_accelerator().device_count())
    port = choose_port(options.master_port)
    if options.master_port not in (0, port):
        text += f", port {options.master_port} is taken"
    return [*flags, f"--master_port={port}"], f"{text}, port {port}"


def share_cores(ranks: int) -> str:
    """Give each rank on this CPU its share of the cores, unless the user has set it; describe it.

    The workers inherit OMP_NUM_THREADS, and DS_ACCELERATOR, which saves them a warning.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    share = max(1, distributed.usable_cores() // ranks)
    return f"OMP_NUM_THREADS={os.environ.setdefault('OMP_NUM_THREADS', str(share))}"


def choose_devices(options: Namespace, available: int) -> tuple[list[str], str]:
    """Take the first --num_gpus of CUDA_VISIBLE_DEVICES (the runner: of the host's devices)."""
    if options.include or options.exclude:
        return [], f"devices {options.include or 'all but ' + options.exclude}"
    count = options.num_gpus if options.num_gpus > 0 else available
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if count > available:
        among = f" (CUDA_VISIBLE_DEVICES={visible})" if visible else ""
        raise ValueError(f"--num_gpus {count}: there are {available} devices here{among}")
    if not visible:
        return [], f"{count} of {available} devices"
    devices = [name.strip() for name in visible.split(",")]
    if devices[0].startswith(NAMED) and len(devices) > available:
        raise ValueError(f"CUDA_VISIBLE_DEVICES={visible}: CUDA finds only {available} of them "
                         "(see nvidia-smi -L); it gives a process one MIG device at most")
    devices = devices[:count]
    if not all(name.isdigit() or name.startswith(NAMED) for name in devices):
        raise ValueError(f"CUDA_VISIBLE_DEVICES={visible}: must be numbers of devices, or names "
                         "(GPU-..., MIG-...)")
    del os.environ["CUDA_VISIBLE_DEVICES"]  # the flag holds it now; the runner would warn
    include = "localhost:" + ",".join(devices)
    return ["--num_gpus=-1", "--num_nodes=-1", f"--include={include}"], f"devices {include}"


def choose_hosts(options: Namespace) -> tuple[list[str], str]:
    """Complete the flags of a launch over --hostfile; with --no_ssh each host does it by itself.

    Raises:
        ValueError: the hostfile is broken, --no_ssh lacks what each host must be told, or the
            launcher is not installed.
    """
    hosts = dict(runner.fetch_hostfile(options.hostfile))
    launcher = options.launcher.lower()
    if options.no_ssh and not (options.master_addr and 0 <= options.node_rank < len(hosts)):
        raise ValueError(
            "--no_ssh: start it on every node, with --master_addr ADDRESS (of the first host) and "
            f"--node_rank N (0 to {len(hosts) - 1}, its place in {options.hostfile})"
        )
    if not options.no_ssh and (len(hosts) > 1 or options.force_multi):
        for program, package in PROGRAMS.get(launcher, {}).items():
            if shutil.which(program) is None:
                raise ValueError(
                    f"--launcher {options.launcher}: there is no {program} here; install it "
                    f"(Debian and Ubuntu: apt-get install {package}), or start each node by itself "
                    "with --no_ssh")
    text = f"{len(hosts)} hosts of {options.hostfile}"
    if distributed.on_cpu():
        ranks = options.num_gpus if options.num_gpus > 0 else max(hosts.values())
        text += f", {ranks} rank(s) on each CPU, {share_cores(ranks)}"
    port = options.master_port or (NO_SSH_PORT if options.no_ssh else choose_port(0))
    flags = [f"--master_port={port}"]
    if launcher in ("openmpi", "slurm"):
        # The runner would ask the first host for its address by ssh, which these do not need.
        flags += ["--no_ssh_check", f"--master_addr={options.master_addr or next(iter(hosts))}"]
    return [*flags, *named_devices(options, hosts)], f"{text}, port {port}"


def named_devices(options: Namespace, hosts: dict[str, int]) -> list[str]:
    """Return flags for the devices that CUDA_VISIBLE_DEVICES names, on this host of several.

    Raises:
        ValueError: it names fewer than this host's ranks, or other hosts are started from here.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not visible.startswith(NAMED) or distributed.on_cpu() or options.include or options.exclude:
        return []
    if not options.no_ssh and (len(hosts) > 1 or options.force_multi):
        if options.launcher.lower() != "pdsh":
            return []  # there every process finds the variable of its own host
        raise ValueError(f"CUDA_VISIBLE_DEVICES={visible}: are devices of this host; name those "
                         f"of each with --include HOST:{visible.split(',')[0]},...@HOST:...")
    here = list(hosts)[options.node_rank if options.no_ssh else 0]
    wanted = {host: options.num_gpus if options.num_gpus > 0 else slots
              for host, slots in list(hosts.items())[: max(0, options.num_nodes) or None]}
    devices = [name.strip() for name in visible.split(",")]
    if len(devices) < wanted.get(here, 0):
        raise ValueError(f"CUDA_VISIBLE_DEVICES={visible}: {len(devices)} device(s) for the "
                         f"{wanted[here]} ranks of {here} (slots in {options.hostfile})")
    slots = {host: devices[:count] if host == here else map(str, range(count))
             for host, count in wanted.items()}
    include = "@".join(f"{host}:{','.join(names)}" for host, names in slots.items())
    return ["--num_gpus=-1", "--num_nodes=-1", f"--include={include}"]


def parse_inclusion_exclusion(
    pool: dict[str, int], include: str, exclude: str
) -> dict[str, list[int]] | dict[str, list[str]]:
    """Return the devices of each host; --include may name them, which DeepSpeed's parser refuses.

    They become the CUDA_VISIBLE_DEVICES of the workers as they are.
    """
    if not any(f"{sign}{prefix}" in include for sign in ":," for prefix in NAMED):
        return runner.parse_inclusion_exclusion(pool, include, exclude)
    given = {host: names for host, _, names in (node.partition(":") for node in include.split("@"))}
    if exclude or not given.keys() <= pool.keys():
        raise ValueError(f"--include {include}: takes hosts of {', '.join(pool)}, and no --exclude")
    return {host: (given[host] or ",".join(map(str, range(pool[host])))).split(",")
            for host in pool if host in given}


def runner_for_hosts() -> ModuleType:
    """Return a copy of DeepSpeed's runner module that uses the launchers below."""
    spec = importlib.util.find_spec(runner.__name__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(PDSHRunner=Pdsh, OpenMPIRunner=OpenMpi, SlurmRunner=Slurm,
                        EXPORT_ENVS=[*runner.EXPORT_ENVS, *FORWARDED],
                        parse_inclusion_exclusion=parse_inclusion_exclusion)
    return module


def _quoted(word: str) -> str:
    """Quote a word for the shell of another host; pdsh reads % as the start of a placeholder."""
    return shlex.quote(word).replace("%", "%%")


class Pdsh(PDSHRunner):
    """Command line of pdsh: one line for the shell of each host."""

    def add_export(self, key: str, var: str) -> None:
        """Set a variable on every host."""
        self.exports[key.strip()] = _quoted(var.strip())

    def parse_user_args(self) -> list[str]:
        """Return the flags of the script."""
        return [_quoted(word) for word in self.args.user_args]

    def get_cmd(
        self, environment: dict[str, str], active_resources: dict[str, list[int]]
    ) -> tuple[list[str], list[str], dict[str, str]]:
        """Return the command that starts the workers, the one that ends them, their environment."""
        self.user_script = _quoted(self.args.user_script)
        self.exports["PATH"] = _quoted(os.path.dirname(sys.executable)) + ':"$PATH"'
        command, kill, environment = super().get_cmd(environment, active_resources)
        here, port = os.path.abspath("."), f"--master_port={self.args.master_port}"
        bare = {f"cd {here};": f"cd {_quoted(here)};", sys.executable: _quoted(sys.executable)}
        # The only flag of the runner that DeepSpeed does not pass on here.
        command.insert(command.index(port), f"--log_level={self.args.log_level}")
        # The brackets keep the pattern from matching the command line that contains it.
        pattern = f"deepspeed.launcher.launc[h] --world_info={self.world_info_base64} .*{port}"
        return [bare.get(word, word) for word in command], [
            *kill[:-2], f"pkill -f {_quoted(pattern)}"], environment


class _Unquoted:
    """Variables without quotes: mpirun and srun use no shell."""

    args: Namespace
    exports: dict[str, str]

    def add_export(self, key: str, var: str) -> None:
        """Set a variable on every host."""
        self.exports[key.strip()] = var.strip()

    def rendezvous(self) -> dict[str, str]:
        """Return where rank 0 listens."""
        return {"MASTER_ADDR": self.args.master_addr, "MASTER_PORT": str(self.args.master_port)}


class OpenMpi(_Unquoted, OpenMPIRunner):
    """Command line of mpirun."""

    def get_cmd(
        self, environment: dict[str, str], active_resources: dict[str, list[int]]
    ) -> list[str]:
        """Return the command that starts the workers."""
        self.exports |= self.rendezvous()
        return super().get_cmd(environment, active_resources)


class Slurm(_Unquoted, SlurmRunner):
    """Command line of srun, which passes on its whole environment, commas and all."""

    def get_cmd(
        self, environment: dict[str, str], active_resources: dict[str, list[int]]
    ) -> list[str]:
        """Return the command that starts the workers; their variables go into `environment`."""
        environment.update(self.exports, **self.rendezvous())
        self.exports = {}
        return super().get_cmd(environment, active_resources)
