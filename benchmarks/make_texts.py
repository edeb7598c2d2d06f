"""Writes ouro/texts: what `ouro report` measures on and what calibration looks at, unless told otherwise.

    python benchmarks/make_texts.py

Continuations of the packaged model, float32, temperature 0.7: stories, relation questions, places, lists and arithmetic, in the
procedural language that it was trained on. The two files share no prompt and no seed.
"""

from __future__ import annotations

import random
from pathlib import Path

import ouro

NAMES = ["Ann", "Bob", "Cid", "Leo", "Uma", "Zoe", "Kim", "Sam", "Wes", "Ned", "Tess", "Bea", "Vic", "Yan", "Hugo", "Finn"]
ROLES = ["boss", "teacher", "cousin", "captain", "neighbor", "sister"]
FOLDER = Path(ouro.__file__).parent / "texts"


def prompts(rng: random.Random, model: ouro.Model) -> list[str]:
    """One of each kind."""
    a, b, c = rng.sample(NAMES, 3)
    r, s = rng.sample(ROLES, 2)
    digits = " ".join(str(rng.randrange(10)) for _ in range(rng.randrange(3, 7)))
    questions = [
        f"{a} is the {r} of {b}. {b} is the {s} of {c}. Who is the {r} of the {s} of {c}?",
        f"{a} took a wooden box to the forest. {b} took a paper map to the hill. Who went to the {rng.choice(['forest', 'hill'])}?",
        f"{rng.choice(['Sort', 'Reverse', 'Largest'])}: {digits}",
        f"What is ({rng.randrange(10)} {rng.choice('+-*')} {rng.randrange(10)}) mod 10?",
    ]
    stories = [f"One day {a} took", f"It was raining. {b}", f"{c} was"]
    return stories + [model.chat_prompt([{"role": "user", "content": q}]) for q in questions]


def write(name: str, seed: int, rounds: int) -> None:
    """One file of texts, an empty line between two."""
    model, rng = ouro.load("ouro-tiny", compute="float32"), random.Random(seed)
    starts = [p for _ in range(rounds) for p in prompts(rng, model)]
    made = [model.generate(p, max_new_tokens=80, temperature=0.7, seed=1000 * seed + i, eos_token_id=[]) for i, p in enumerate(starts)]
    texts = [p + model.to_string(g.token_ids) for p, g in zip(starts, made, strict=True)]
    (FOLDER / name).write_text("\n\n".join(t.strip("\n").replace("\n\n", "\n") for t in texts) + "\n")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    write("report.txt", seed=1, rounds=3)
    write("calibration.txt", seed=2, rounds=3)
