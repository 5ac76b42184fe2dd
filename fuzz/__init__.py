"""Coverage-guided fuzzing of everything that reads a file, a config or a command line.

    make fuzz                                     every target, five minutes each
    python -m fuzz loras prompts --seconds 60     some of them
    python -m fuzz.child loras FILE               one input again, with its traceback

What is held of every input: it works, or it ends in one of the project's own errors with a message; no other exception,
no five seconds, no 2 GiB, no process, connection or file outside the input's folder; nothing written where it fails;
and what is accepted reads back equal where there is a writer.

`targets/` has a module for each target: `check(data, folder)` draws an input from the bytes and tries it, `seeds()` gives
inputs to begin with. `guard` watches, `child` is the process that atheris drives, `__main__` runs targets and adds what
came of it to `record.json`. A finding's input is kept under `runs/fuzz/TARGET/findings/`; each was mended in the code
that reads, with a test beside that code's own. Needs atheris (Linux, Python 3.11 to 3.13).
"""
