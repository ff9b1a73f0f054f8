"""The beginning of a script, for tests in which several processes prepare one token directory, and some are killed."""

FORK = """
import os, shutil, sys
from pathlib import Path
from jgpt.config.defaults import default_config

config = default_config()
config.tokenizer.kind, config.data.text_glob, config.data.cache_dir = "char", sys.argv[1], sys.argv[2]
directory = Path(config.data.cache_dir)

def fork(work, killed_at=0):  # work() returns an exit code
    if pid := os.fork():
        return pid
    events = 0

    def count(name, arguments):
        nonlocal events
        if name in ("open", "os.rename", "os.remove", "os.mkdir", "fcntl.flock"):
            events += 1
            if events == killed_at:
                os.kill(os.getpid(), 9)

    sys.addaudithook(count)
    try:
        code = work()
    except BaseException as error:
        print("failed:", repr(error), flush=True)
        os._exit(1)
    os._exit(code)

def ends(*pids):
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

def content():
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}
"""
