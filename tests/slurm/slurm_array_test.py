"""A sweep as a Slurm array on a real Slurm: munged, slurmctld and two slurmd on this machine, in a folder of their own.
An array of 8 tasks is submitted from what `kvlapse replay --emit-sbatch` prints; one running task is killed and requeued;
the merged file must equal, byte for byte, that of one process.

    python3 tests/slurm/slurm_array_test.py build/release/kvlapse

Needs the Debian package slurm-wlm, and root (slurmd starts jobs as their owner).
"""

import getpass
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time

N_TASKS = 8
CONF = """
ClusterName=kvlapse
SlurmctldHost={host}
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
KillWait=1
MinJobAge=3600
JobRequeue=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2 RealMemory=2048 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2 RealMemory=2048 State=UNKNOWN
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Slurm:
    """The daemons; stops those that it started."""

    def __init__(self, folder):
        self.folder, self.children = folder, []
        self.env = dict(os.environ, SLURM_CONF=str(folder / "slurm.conf"))
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        values = {"folder": folder, "user": getpass.getuser(), "host": socket.gethostname().split(".")[0]}
        values |= {name: free_port() for name in ("port", "port1", "port2")}
        (folder / "slurm.conf").write_text(CONF.format(**values))
        self.start("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
                   f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed")
        wait(lambda: (folder / "munge.socket").exists(), 20, "munged's socket")
        self.start("slurmctld", "-D", "-c")
        self.start("slurmd", "-D", "-N", "node1")
        self.start("slurmd", "-D", "-N", "node2")
        wait(lambda: self.run("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"], 60, "two idle nodes")

    def start(self, name, *arguments):
        path = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
        log = open(self.folder / f"{name}-{len(self.children)}.log", "w")
        self.children.append(subprocess.Popen([path, *arguments], env=self.env, stdout=log, stderr=log))

    def run(self, *command, check=False):
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, cwd=self.folder)
        if check and done.returncode:
            raise SystemExit(f"{command}: {done.stderr}")
        return done.stdout.strip()

    def stop(self):
        for child in reversed(self.children):
            child.terminate()
        for child in self.children:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()


def wait(ready, seconds, what):
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise SystemExit(f"waited {seconds} s in vain for {what}")
        time.sleep(0.1)


def main():
    kvlapse = pathlib.Path(sys.argv[1]).resolve()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="kvlapse-slurm-"))
    slurm = None
    try:
        def call(*arguments):
            return subprocess.run([kvlapse, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout

        call("record", "-q", "--max-tokens", "900", "--ignore-eos", "-o", "run.kvl")
        sweep = ["replay", "run.kvl", "--policy", "full,longflow,random,h2o,rkv,streaming_llm", "--budget", "10%,20%,30%,40%"]
        call(*sweep, "-q", "-o", "one.kvr")
        script = call(*sweep, "-o", "all.kvr", "--emit-sbatch", str(N_TASKS), "--memory-mib", "256", "--cells-at-once", "1")
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        (folder / "array.sh").write_text(script)

        slurm = Slurm(folder)
        slurm.env["PATH"] = f"{kvlapse.parent}:{slurm.env['PATH']}"
        job = slurm.run("sbatch", "--parsable", "--export=ALL", "array.sh", check=True)

        def states():
            lines = slurm.run("squeue", "-h", "-r", "-a", "-t", "all", "-j", job, "-o", "%K %T").splitlines()
            return {int(index): state for index, state in (line.split() for line in lines if line.split()[0].isdigit())}

        # The first task that is seen working is killed as a lost node would do it, and requeued.
        def some_part():
            return [i for i, state in states().items() if state == "RUNNING" and (folder / f"all.part-{i}.kvr").exists()]
        wait(some_part, 120, "a running task with an unfinished part")
        killed = some_part()[0]
        slurm.run("scancel", "--signal=KILL", "--full", f"{job}_{killed}")
        slurm.run("scontrol", "requeue", f"{job}_{killed}")
        slurm.run("scontrol", "release", f"{job}_{killed}")

        def finished():
            now = states()
            for i, state in now.items():
                if state in ("FAILED", "CANCELLED"):  # the signal came first: the same requeue, from its end
                    slurm.run("scontrol", "requeue", f"{job}_{i}")
                elif state == "PENDING":  # Slurm holds a requeued task back for two minutes
                    slurm.run("scontrol", "update", f"JobId={job}_{i}", "StartTime=now")
            return len(now) == N_TASKS and all(state == "COMPLETED" for state in now.values())
        wait(finished, 300, f"{N_TASKS} completed tasks; " + str(states()))

        call("merge", *sorted(str(p) for p in folder.glob("all.part-*.kvr")), "-o", "all.kvr")
        if (folder / "all.kvr").read_bytes() != (folder / "one.kvr").read_bytes():
            raise SystemExit("the merged file differs from that of one process")
        restarts = slurm.run("scontrol", "show", "job", f"{job}_{killed}")
        count = [word for word in restarts.split() if word.startswith("Restarts=")]
        print(f"array of {N_TASKS} on two nodes, task {killed} killed ({count[0] if count else 'no count'}): the same bytes as one process")
        if count and count[0] == "Restarts=0":
            raise SystemExit("no task was requeued: nothing was tested")
    except BaseException:
        for log in sorted(folder.glob("*.log")) + sorted(folder.glob("slurm-*.out")):
            print(f"--- {log.name}\n" + log.read_text(errors="replace")[-2000:], file=sys.stderr)
        raise
    finally:
        if slurm:
            slurm.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
