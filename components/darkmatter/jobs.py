"""The pipeline as a job: what a schedule runs, here or on a cluster, and how it is sent to a cluster.

A job works in a clone of a commit that goes with it, so that two never share a folder. What is done already, its branch
says: dvc.lock and metrics are taken from there, the data from DVC's remote, and at the end, however it ends, both go back.
So a job that is run again skips what is done, goes on with what is not, and has nothing to do when nothing is new.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from darkmatter import cluster, console, lease, params, remote
from darkmatter.redact import redact

WEBHOOK = "DARKMATTER_WEBHOOK"

Kind = Literal["champion", "candidate", "refused", "nothing new", "busy", "stopped", "failed"]

#: Exit status by outcome.
STATUS: Mapping[Kind, int] = {
    "champion": 0,
    "candidate": 0,
    "nothing new": 0,
    "refused": 3,
    "busy": console.TRY_AGAIN,
    "stopped": console.TRY_AGAIN,
    "failed": 1,
}

_RETURNED = ("dvc.lock", "metrics")  # to the branch
_GROWING = {"ingest": "data/shards", "augment": "data/train"}  # stages that add to their last output
_WAIT = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended: what its exit status, its notification and the message of its commit say."""

    kind: Kind
    reason: str
    repository: str
    commit: str = ""
    branch: str = ""
    version: str | None = None
    """In the registry, of the model that was made."""
    rules_failed: Sequence[str] = ()
    """Of the gate."""
    ingested: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """metrics/ingest.json."""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


def run(repository: str, ref: str, *, branch: str, wait: float = 0.0) -> Outcome:
    """Runs the pipeline as of a commit.

    Args:
        repository: what `git clone` takes.
        ref: a branch, tag or commit of it.
        branch: where dvc.lock and metrics come from and go to; made when it is not there.
        wait: seconds to wait for another job of the same branch.

    Raises:
        ValueError: no such repository or ref, or a place that would not outlast the job.
        Unreadable: the store of `place.storage` cannot be reached.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="darkmatter-job-", ignore_cleanup_errors=True) as scratch:
        job = _Job(Path(scratch), repository, branch)
        commit = job.clone(ref)
        print(f"job: commit {commit} of {redact(repository)}, branch {branch}", flush=True)
        place = job.place()
        try:
            with _lease(f"{place.storage}/jobs/{branch.replace('/', '-')}", wait):
                outcome = job.run(place)
        except lease.Held as error:
            outcome = Outcome(kind="busy", reason=str(error), repository=redact(repository))
    return dataclasses.replace(outcome, commit=commit, branch=branch, seconds=round(time.monotonic() - started, 1))


@contextlib.contextmanager
def _lease(address: str, wait: float) -> Iterator[None]:
    deadline = time.monotonic() + wait
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lease.held(address, doing="runs a job of this branch"))
                break
            except lease.Held as error:
                if time.monotonic() + _WAIT > deadline:
                    raise
                print(f"job: waiting; {error}", flush=True)
                time.sleep(_WAIT)
        yield


class _Job:
    def __init__(self, scratch: Path, repository: str, branch: str) -> None:
        self.repository, self.branch = repository, branch
        self.folder, self.ending = scratch / "clone", scratch / "ending.json"
        self.environment = {
            **os.environ,
            # The code of the commit, and this Python: DVC runs `python`.
            "PYTHONPATH": os.pathsep.join(filter(None, [f"{self.folder}/components", os.environ.get("PYTHONPATH")])),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            console.ENDING: str(self.ending),
            "GIT_TERMINAL_PROMPT": "0",
        }
        self.asked_to_stop = False
        self.shared = False
        """Whether there is a DVC remote."""
        self.tip = ""
        """Of the branch."""
        self.told: dict[str, Any] = {}
        """What the branch knows to be done."""

    def clone(self, ref: str) -> str:
        """Returns the commit."""
        self._git("clone", "--quiet", "--no-checkout", self.repository, str(self.folder), here=False)
        for name in (f"origin/{ref}", ref):  # the branch as it is there
            if self._git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", may_fail=True):
                self._git("checkout", "--quiet", "--detach", name)
                return self._git("rev-parse", "HEAD")
        raise ValueError(f"{redact(self.repository)} has no branch, tag or commit {ref!r}")

    def place(self) -> cluster.PlaceConfig:
        """The section `place` of the clone, as DARKMATTER_PLACE changes it; its file may be one of the clone."""
        if named := os.environ.get(params.PLACE):
            self.environment[params.PLACE] = os.environ[params.PLACE] = str((self.folder / named).resolve())
        tree = params.read(self.folder / "params.yaml")["place"]
        place = params.parse(cluster.PlaceConfig, tree, where="place")
        registry = os.environ.get("MLFLOW_TRACKING_URI") or place.mlflow
        for key, address in {"storage": place.storage, "mlflow": registry.removeprefix("sqlite:///")}.items():
            if not (remote.is_remote(address) or Path(address).is_absolute()):
                raise ValueError(
                    f"place.{key}: {address} is in the clone, which goes with the job; name an address or a whole path in a "
                    f"file, and the file in {params.PLACE}"
                )
        return place

    def run(self, place: cluster.PlaceConfig) -> Outcome:
        """With the lease."""
        self._take_from_branch()
        if place.dvc:
            self._dvc("remote", "add", "--local", "--force", "--default", "store", place.dvc)
        self.shared = bool(self._dvc("remote", "list"))
        if not self.shared:
            print("job: there is no DVC remote, so that the next job will find no data of this one", flush=True)
        before = self.told = self._lock()
        with self._forwarding_sigterm():
            outcome = self._outcome(self._reproduce(), before)
            if not self._keep(outcome.kind, outcome.reason):
                reason = f"DVC's remote did not take what was made, so the branch is not told of it ({outcome})"
                return dataclasses.replace(outcome, kind="failed", reason=reason)
        return outcome

    def _take_from_branch(self) -> None:
        """dvc.lock and metrics of the branch, or none: those of the commit speak of another store and another registry."""
        for name in _RETURNED:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.tip = self._git("rev-parse", "--verify", "--quiet", f"origin/{self.branch}^{{commit}}", may_fail=True)
        if self.tip:
            there = self._git("ls-tree", "--name-only", self.tip, "--", *_RETURNED).split()
            self._git("checkout", "--quiet", self.tip, "--", *there)

    def _reproduce(self) -> int:
        options = ["--pull", "--allow-missing"] if self.shared else []
        status = self._say("dvc", "repro", *options, "discover")
        if not status and self.shared and (growing := self._growing()):
            self._say("dvc", "pull", "--quiet", *growing)
        if not status and not self.asked_to_stop:  # whoever is killed after it need not ingest again
            status = self._say("dvc", "repro", *options, *_GROWING)
            self._keep("data", "ingested, not trained on yet")
        return status if status or self.asked_to_stop else self._say("dvc", "repro", *options)

    def _growing(self) -> list[str]:
        """Outputs that a stage will add to, if the branch knows them: DVC fetches what is read, not what is changed."""
        changed = json.loads(self._dvc("status", "--json", *_GROWING))
        first = next((n for n, stage in enumerate(_GROWING) if _runs(changed.get(stage, []))), len(_GROWING))
        return [out for stage, out in list(_GROWING.items())[first:] if stage in self._lock()]

    def _outcome(self, status: int, before: Mapping[str, Any]) -> Outcome:
        common: dict[str, Any] = {"repository": redact(self.repository), "ingested": self._metrics("ingest")}
        if status:
            ended = json.loads(self.ending.read_text()) if self.ending.exists() else {}
            if self.asked_to_stop or ended.get("status") == console.TRY_AGAIN:
                reason = ended.get("message") or "asked to stop; what was done is kept"
                return Outcome(kind="stopped", reason=reason, **common)
            reason = f"{ended['stage']}: {ended['message']}" if ended else "a stage ended without a word; see the log"
            return Outcome(kind="failed", reason=reason, **common)
        decision = self._metrics("register")
        version, rules = decision.get("version"), decision["rules"]
        unchanged = self._lock().get("register") == before.get("register")
        if unchanged and version is not None:
            reason = f"nothing has changed since version {version}"
            return Outcome(kind="nothing new", reason=reason, version=version, **common)
        failed = [name for name, rule in rules.items() if not rule["passed"]]
        why = "; ".join(f"{name}: {rules[name]['reason']}" for name in failed)
        common |= {"version": version, "rules_failed": failed}
        if version is None:  # as well when it was refused before: what is wrong does not pass by asking again
            since = "nothing has changed since the gate refused it" if unchanged else "the gate refused it"
            return Outcome(kind="refused", reason=f"{since}. {why}", **common)
        if "champion" in decision["alias"]:
            return Outcome(kind="champion", reason=f"version {version} is the champion", **common)
        return Outcome(kind="candidate", reason=f"version {version} is registered. {why}", **common)

    def _keep(self, kind: str, reason: str) -> bool:
        """What was made goes to DVC's remote, and then a commit to the branch: the code that ran, dvc.lock and metrics."""
        if self._lock() == self.told:
            return True
        if self.shared and self._say("dvc", "push", "--quiet", "--run-cache"):
            return False
        there = [name for name in _RETURNED if (self.folder / name).exists()]
        self._git("add", "--force", "--", *there)
        tree = self._git("write-tree")
        head = self._git("rev-parse", "HEAD")
        parents = [self.tip] if self.tip and self._is_ancestor(head, self.tip) else [self.tip, head]
        options = [part for parent in parents if parent for part in ("-p", parent)]
        author = ["-c", "user.name=darkmatter", "-c", "user.email=darkmatter@localhost"]
        message = f"Run of {head[:12]}: {kind}\n\n{reason}\n"
        self.tip = self._git(*author, "commit-tree", tree, *options, "-m", message)
        self._git("push", "--quiet", "origin", f"{self.tip}:refs/heads/{self.branch}")
        self.told = self._lock()
        return True

    def _is_ancestor(self, commit: str, of: str) -> bool:
        return self._git("merge-base", commit, of, may_fail=True) == commit

    def _lock(self) -> dict[str, Any]:
        """What dvc.lock says of each stage, but for `discover`, which always runs."""
        path = self.folder / "dvc.lock"
        stages = yaml.safe_load(path.read_text())["stages"] if path.exists() else {}
        return {name: stage for name, stage in stages.items() if name != "discover"}

    def _metrics(self, stage: str) -> dict[str, Any]:
        path = self.folder / "metrics" / f"{stage}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    @contextlib.contextmanager
    def _forwarding_sigterm(self) -> Iterator[None]:
        """SIGTERM goes to the stage, which saves and ends; DVC, which would die of it, ignores it (`_say`)."""

        def forward(number: int, frame: object) -> None:
            print("job: asked to stop; the stage that runs is told", flush=True)
            self.asked_to_stop = True
            if self._child is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._child.pid, signal.SIGTERM)

        before = signal.signal(signal.SIGTERM, forward)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    _child: "subprocess.Popen[bytes] | None" = None

    def _say(self, *command: str) -> int:
        """Runs a command whose output is for people, in a group of its own and with SIGTERM ignored."""
        ignoring = "import os, signal, sys; signal.signal(15, signal.SIG_IGN); os.execvp(sys.argv[1], sys.argv[1:])"
        started = [sys.executable, "-c", ignoring, *command]
        self._child = subprocess.Popen(started, cwd=self.folder, env=self.environment, start_new_session=True)
        try:
            return self._child.wait()
        finally:
            self._child = None

    def _dvc(self, *arguments: str) -> str:
        return self._answer("dvc", *arguments)

    def _git(self, *arguments: str, here: bool = True, may_fail: bool = False) -> str:
        return self._answer("git", *arguments, here=here, may_fail=may_fail)

    def _answer(self, *command: str, here: bool = True, may_fail: bool = False) -> str:
        where = self.folder if here else None
        done = subprocess.run(command, cwd=where, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode and not may_fail:
            told = (done.stderr or done.stdout).strip().splitlines()
            shown = " ".join(redact(part) for part in command[:3])
            raise ValueError(f"{shown} ...: {redact(told[-1]) if told else f'status {done.returncode}'}")
        return done.stdout.strip() if done.returncode == 0 else ""


def _runs(changes: Sequence[Any]) -> bool:
    """Whether DVC would run a stage: what `dvc status` tells of it, but for files that are only not here."""
    there = (what for one in changes for what in (one.values() if isinstance(one, dict) else [one]))
    return any(not isinstance(what, dict) or set(what.values()) != {"deleted"} for what in there)


def notify(outcome: Outcome) -> None:
    """Sends the outcome as JSON to the address in DARKMATTER_WEBHOOK, if there is one; `text` is for chats.

    One that cannot be reached changes nothing: the exit status says the same.
    """
    address = os.environ.get(WEBHOOK)
    if not address:
        return
    where = f"{outcome.repository} {outcome.commit[:12]}"
    tree = {"text": f"darkmatter, {where}: {outcome}", "status": STATUS[outcome.kind], **dataclasses.asdict(outcome)}
    request = urllib.request.Request(
        address, json.dumps(tree).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=30):
            pass
    except (OSError, ValueError) as error:  # ValueError: no address at all
        reason = f"{type(error).__name__} {error.code if isinstance(error, urllib.error.HTTPError) else ''}".strip()
        print(f"darkmatter: the notification was not delivered ({reason})", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    chosen = _parser().parse_args(arguments)
    if chosen.place:
        os.environ[params.PLACE] = chosen.place
    if chosen.command == "submit":
        sys.exit(_submit(chosen))
    try:
        outcome = run(chosen.repository, chosen.ref, branch=chosen.branch, wait=60 * chosen.wait)
    except (ValueError, console.Stopped) as error:
        outcome = Outcome(kind="failed", reason=redact(str(error)), repository=redact(chosen.repository))
    notify(outcome)
    print(f"\njob: {outcome} ({outcome.seconds:.0f} s)", flush=True)
    sys.exit(STATUS[outcome.kind])


def _submit(chosen: argparse.Namespace) -> int:
    address = chosen.address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", "")
    if not address.startswith(("http://", "https://")):
        raise ValueError(
            f"{address or 'nothing'!r} is no address of a cluster's dashboard; give --address http://HOST:8265 or set "
            "RAY_API_SERVER_ADDRESS"
        )
    command = ["python", "-m", "darkmatter.jobs", "run", "--repository", chosen.repository, "--ref", chosen.ref]
    command += ["--branch", chosen.branch, "--wait", str(chosen.wait)]
    command += ["--place", chosen.place] if chosen.place else []
    job = cluster.submit(command, address=address, name=f"darkmatter {chosen.ref} -> {chosen.branch}")
    print(f"job {job} on {address}", flush=True)
    return 0 if chosen.no_wait else cluster.follow(job, address=address)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m darkmatter.jobs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    here = commands.add_parser("run", help="run the pipeline here; inside a job this is the cluster")
    submit = commands.add_parser("submit", help="send that to a Ray cluster, print what it prints, end as it ends")
    for command in (here, submit):
        command.add_argument("--repository", required=True, help="what git clone takes, from where the job runs")
        command.add_argument("--ref", default="main", help="branch, tag or commit")
        command.add_argument("--branch", default="runs/nightly", help="where dvc.lock and metrics come from and go to")
        command.add_argument("--wait", type=float, default=0, help="minutes for another job of this branch to end")
        command.add_argument(
            "--place", help="YAML file with keys of the section place, of the repository or a whole path"
        )
    submit.add_argument("--address", help="of the dashboard; or RAY_API_SERVER_ADDRESS")
    submit.add_argument("--no-wait", action="store_true", help="end when the cluster has taken it")
    return parser


if __name__ == "__main__":
    console.run(main)
