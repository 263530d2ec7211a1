"""MBPP: write a function from a sentence and three tests."""

from dataclasses import dataclass

from forgetless.core.errors import UserError
from forgetless.data.files import Row
from forgetless.tasks.code import DownloadedCodeTask, Program, defined_names
from forgetless.tasks.rows import the_field

_SHOTS = (2, 3, 4)
_TEST = range(11, 511)


@dataclass(frozen=True)
class MBPP(DownloadedCodeTask):
    """pass@1 on MBPP's 500 test problems, each run with its tests in the sandbox.

    The model reads three worked examples (problems 2, 3 and 4), then a problem with its three
    tests, and writes until "[DONE]": prompt and stop of the lm-evaluation-harness's task `mbpp`,
    version 1. A problem's own set-up, which that task leaves out, is run before its tests. The
    value is the mean over problems of the share of samples that pass; `extra` has pass@k. The file
    in `data_dir` is mbpp.jsonl, with the problems 2, 3 and 4 in it; for the settings see
    `DownloadedCodeTask`.

    Reference:
        Austin et al. 2021, "Program Synthesis with Large Language Models", arXiv:2108.07732.
    """

    kind = "mbpp"
    summary = "MBPP's functions that pass their tests (pass@k)"
    stop = "[DONE]"

    name: str = "mbpp"
    max_new_tokens: int = 256

    def read(self) -> list[Program]:
        """The 500 test problems, each behind the worked examples."""
        rows = {
            int(the_field(row, "task_id", where)): (where, row)
            for where, row in self.rows(
                "mbpp", "google-research-datasets/mbpp", ["prompt", "test"], "full"
            )
        }
        missing = [number for number in _SHOTS if number not in rows]
        if missing:
            raise UserError(
                f"task 'mbpp': problems {_SHOTS} are its worked examples, and the data lack "
                f"{missing}; give the file with all of MBPP"
            )
        shots = "".join(
            f"{_question(row, where)}{the_field(row, 'code', where)}\n[DONE]\n\n"
            for where, row in (rows[number] for number in _SHOTS)
        )
        programs = []
        for number in sorted(rows):
            if number in _TEST:
                where, row = rows[number]
                setup, code = row.get("test_setup_code") or "", str(the_field(row, "code", where))
                programs.append(
                    Program(
                        id=str(row["task_id"]),
                        prompt=shots + _question(row, where),
                        expected=code,
                        before="",
                        test="\n".join([setup, *the_field(row, "test_list", where)]),
                        names=defined_names(code),
                        setup=setup,  # the program may use it too
                    )
                )
        return programs


def _question(row: Row, where: str) -> str:
    tests = "\n".join(the_field(row, "test_list", where)[:3])
    return (
        f"You are an expert Python programmer, and here is your task: "
        f"{the_field(row, 'text', where)} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


TASK = MBPP
