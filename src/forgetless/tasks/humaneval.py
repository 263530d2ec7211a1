"""HumanEval: finish a function from its head and its documentation."""

from dataclasses import dataclass

from forgetless.tasks.code import DownloadedCodeTask, Program, defined_names
from forgetless.tasks.rows import the_field

_FIELDS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")


@dataclass(frozen=True)
class HumanEval(DownloadedCodeTask):
    """pass@1 on HumanEval's 164 functions, each run with its tests in the sandbox.

    The model reads the head and the documentation alone (no worked example) and writes until a new
    class, function, comment, condition or print at the left margin: prompt and stops of the
    lm-evaluation-harness's task `humaneval`, version 1. The value is the mean over problems of the
    share of samples that pass; `extra` has pass@k. The file in `data_dir` is HumanEval.jsonl; for
    the settings see `DownloadedCodeTask`.

    Reference:
        Chen et al. 2021, "Evaluating Large Language Models Trained on Code", arXiv:2107.03374.
    """

    kind = "humaneval"
    summary = "HumanEval's functions that pass their tests (pass@k)"
    stop = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

    name: str = "humaneval"

    def read(self) -> list[Program]:
        """All 164 problems."""
        programs = []
        for where, row in self.rows("HumanEval", "openai/openai_humaneval", ["test"]):
            number, prompt, solution, test, entry = (
                str(the_field(row, name, where)) for name in _FIELDS
            )
            tests = f"{test}\ncheck({entry})"
            # They may use what the head has beside the function to write, but as it stands there.
            helpers = prompt if defined_names(prompt) else ""
            programs.append(
                Program(number, prompt, solution, prompt, tests, (entry,), helpers=helpers)
            )
        return programs


TASK = HumanEval
