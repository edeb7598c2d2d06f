"""The pictures and figures of docs/measures.md: `python docs/measures.py` from the root of the repository."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import ouro
from ouro import measures
from ouro.probes import faithfulness

HERE = Path(__file__).parent


def turn(question: str, answer: str) -> str:
    """A question and its answer as the model was trained to read them."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"


TEXTS = [
    turn("Leo is the captain of Uma. Zoe is the cousin of Leo. Who is the cousin of the captain of Uma?", "Zoe."),
    turn("Yan is the boss of Hugo. Who is the boss of Hugo?", "Yan.") + turn("Sort: 5 2 9 1", "1 2 5 9."),
    turn("Tess took a wooden box to the forest. Bea took a paper map to the hill. Who went to the forest?", "Tess."),
    turn("What is (6 - 4) mod 10?", "2.") + turn("Largest: 1 1 2 4 5", "5.") + turn("What is (3 + 4) mod 10?", "7."),
    "It was raining. Leo was walking to the old mill and carried a small lamp. Leo felt sad because something was missing.",
    'At the tower Finn was waiting with a small lamp. "I lost a small lamp near the old mill," said Finn. "I have it here," said Leo.',
]
NAMES = ("Ann", "Bob", "Leo", "Zoe", "Sam", "Kim", "Tess", "Finn")


def two_hop() -> tuple[list[str], list[int]]:
    """Two-hop questions up to the place of the answer, and the person each asks for (as a group for the splits)."""
    prompts, groups = [], []
    for i, a in enumerate(NAMES):
        for j, b in enumerate(NAMES):
            for k, c in enumerate(NAMES):
                if len({i, j, k}) == 3 and (i + 2 * j + 3 * k) % 4 == 0:
                    question = f"{a} is the boss of {b}. {b} is the teacher of {c}. Who is the boss of the teacher of {c}?"
                    prompts.append(turn(question, "").removesuffix("<|im_end|>\n"))
                    groups.append(j)
    return prompts, groups


def main() -> None:
    """Measure, print what the page quotes, draw."""
    model = ouro.load("ouro-tiny", compute="float32")
    trace = model.trace(TEXTS, logits="none")
    cache = model.run_with_cache(TEXTS, ["resid_pre", "resid_post", "state", "pattern", "rot_k", "v"], logits="none")[1]
    sweep, pareto, rest = measures.depth_sweep(model, TEXTS), measures.exit_pareto(trace), measures.fixed_point(model, TEXTS, n_steps=32)
    heads = measures.attention_drift(model, measures.repeated_tokens(model, 32, batch=8))
    shared, lens, same = measures.kv_similarity(cache), measures.logit_lens(model, cache), measures.agreement(trace)
    turned, decay = measures.angular_distance(cache), measures.perturbation_decay(model, TEXTS, n_steps=8)
    drift, flips = measures.loop_drift(model, TEXTS, n_steps=8), measures.answer_flips(trace)
    tuned = measures.logit_lens(
        model, cache, tuned=measures.TunedLens().fit(model, [*TEXTS[::-1], "One day Ann took a tiny boat to the hill."])
    )
    prompts, groups = two_hop()
    names = [model.to_tokens(f"{n}.")[0] for n in NAMES]
    said = faithfulness(model, prompts, sorted(set(names)), groups=groups, cv=4)

    def row(name: str, array: ouro.LabelledArray) -> None:
        over = [d for d in ("batch", "pos") if d in array.dims]
        mean = array.mean(*over) if over else array
        print(f"{name:46}", "  ".join(f"{x:.3g}" for x in mean.values.reshape(-1)))

    row("relative L2 from the step before, steps 1..7", drift["relative_l2"].sel(step=list(range(1, 8))))
    row("acceleration, steps 2..7", drift["acceleration"].sel(step=list(range(2, 8))))
    row("loss of n_steps 1..8, nats", sweep["loss"])
    row("accuracy of n_steps 1..8", sweep["accuracy"])
    row("top-1 agreement with the last step", same["top1"].sel(other_step=3))
    row("flips of the top token", flips["flips"])
    row("commitment step", flips["commitment"])
    row("exit pdf", measures.exit_report(trace)["pdf"])
    row("CKA with the last step", measures.cka(trace).sel(other_step=3))
    row("relative distance to state 31, steps 3 7 15", rest["to_last"].sel(step=[3, 7, 15]))
    row("contraction, mean of texts", rest["contraction"])
    row("what is left of a change, steps 0..7", decay["gain"])
    row("angular distance of layers 0..3, mean of steps", turned["distance"].mean("step"))
    row("KL of the lens, layer 0, by step", lens["kl"].sel(layer=0))
    row("KL of the lens, layer 3, by step", lens["kl"].sel(layer=3))
    row("stability of heads by step", heads["stability"].mean("layer", "head"))
    best = heads["induction"].values.reshape(4, -1)
    print(
        f"{'strongest induction head by step':46}",
        "  ".join(f"{x:.2f} ({i // 4}.{i % 4})" for x, i in zip(best.max(1), best.argmax(1), strict=True)),
    )
    for policy in shared["key_residual"].coords["policy"]:
        row(f"keys lost by {policy}, steps 0..3", shared["key_residual"].sel(policy=policy).mean("layer"))
    row("two-hop answers: agreement with the last step", said["agreement"].sel(other_step=3))
    row("most frequent two-hop answer", said["majority"])
    row("probe of the last answer, end of each step", said["probe"].sel(answer_step=3, layer=3))

    figure, axes = plt.subplots(3, 2, figsize=(12, 10.5), layout="constrained")
    for result, ax in zip((drift, sweep, same, flips, measures.exit_report(trace), pareto), axes.flat, strict=True):
        result.plot(ax=ax)
    figure.savefig(HERE / "measures-steps.png", dpi=75)
    figure, axes = plt.subplots(4, 2, figsize=(12, 13.5), layout="constrained")
    for result, ax in zip((turned, lens, heads, heads["induction"], shared, rest, decay, said), axes.flat, strict=True):
        result.plot(ax=ax)
    figure.savefig(HERE / "measures-layers.png", dpi=75)
    figure, ax = plt.subplots(figsize=(12, 5), layout="constrained")
    lens["probability"].plot(batch=0, most=16, ax=ax)
    figure.savefig(HERE / "measures-lens.png", dpi=75)
    print(f"{'mean KL inside: plain, tuned lens':46}", *(f"{float(x['kl'].sel(layer=[0, 1, 2]).mean()):.3g}" for x in (lens, tuned)))


if __name__ == "__main__":
    main()
