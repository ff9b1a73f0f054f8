"""Which processes make up a run: by flags, by the environment, by what a cluster sets."""

import logging
from unittest import mock

import pytest

from jgpt.errors import UserError
from jgpt.hardware.cluster import Place, find_place

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}  # fmt: skip
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


def find(environment: dict[str, str], *given: object) -> Place | None:
    with mock.patch("glob.glob", return_value=[]):  # no TPU here
        return find_place(*(given or (None, None, None)), environment)  # pyright: ignore[reportArgumentType]


def test_one_process_is_the_default():
    assert find({}) is None
    assert find({}, None, 1, None) is None  # said in so many words
    assert find({"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "a:1"}) is None


def test_flags_go_before_the_environment():
    environment = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert find(environment) == Place("a:1", 2, 1)
    assert find(environment, "b:2", 4, 3) == Place("b:2", 4, 3)
    assert find(environment, None, None, 0) == Place("a:1", 2, 0)


@pytest.mark.parametrize(
    "given, said",
    [
        (("a:1", None, None), "coordinator_address=a:1 without num_processes and process_id"),
        ((None, 2, None), "--coordinator_address=... --process_id=..."),
        ((None, 1, 1), "process_id=1 without coordinator_address"),
        (("a:1", 2, 2), "from 0 to 1"),
        (("a:1", 0, 0), "num_processes=0"),
        (("a:1", 2, -1), "process_id=-1"),
        (("a", 2, 0), "HOST:PORT"),
        (("a:0", 2, 0), "HOST:PORT"),
        (("a:99999", 2, 0), "HOST:PORT"),
    ],
)
def test_values_that_cannot_be_are_refused(given: tuple[object, ...], said: str):
    with pytest.raises(UserError, match=r"Allowed|all three") as error:
        find({}, *given)
    assert said in str(error.value)


def test_a_variable_that_is_no_number_is_named():
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES is 'two'"):
        find({"JAX_NUM_PROCESSES": "two"})


def test_slurm_starts_several_processes_without_flags():
    assert find(SLURM) == Place(None, 2, None)
    assert find(SLURM | {"JAX_COORDINATOR_ADDRESS": "a:1"}) == Place("a:1", 2, None)


@pytest.mark.parametrize("changed", [{"SLURM_NTASKS": "1"}, {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}])
def test_a_task_of_slurm_that_is_alone_waits_for_nobody(changed: dict[str, str]):
    assert find(SLURM | changed) is None
    assert find({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}) is None  # sbatch's own


def test_one_process_on_a_node_takes_all_its_gpus():
    gpus = {"SLURM_GPUS_ON_NODE": "4"}
    assert find(SLURM | gpus | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}) == Place(None, 2, None, [0, 1, 2, 3])
    assert find(SLURM | gpus | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}) == Place(None, 2, None)  # JAX: one each


def test_open_mpi_is_left_to_jax():
    assert find({"OMPI_COMM_WORLD_SIZE": "4"}) == Place(None, None, None)
    assert find({"OMPI_COMM_WORLD_SIZE": "1"}) is None


def test_a_pod_of_an_indexed_job_needs_the_package_kubernetes(caplog: pytest.LogCaptureFixture):
    with mock.patch("importlib.util.find_spec", return_value=None), caplog.at_level(logging.WARNING, "jgpt"):
        assert find(POD) is None
    assert "pod 1" in caplog.text and "pip install kubernetes" in caplog.text
    with mock.patch("importlib.util.find_spec", return_value=object()):
        assert find(POD) == Place(None, None, None)
    assert find({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None  # a notebook in a cluster


def test_hosts_of_a_tpu():
    assert find({"TPU_WORKER_HOSTNAMES": "a,b"}) == Place(None, None, None)
    assert find({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
