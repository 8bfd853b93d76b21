"""What an episode of PPO costs here, and in TRL 1.12's PPOTrainer (the last one TRL had), on the same model.

    python tests/benchmarks/ppo.py speed  --trl PYTHON          42M-parameter Llama shape, random weights
    python tests/benchmarks/ppo.py stories --data DIR --reward DIR --trl PYTHON   a real model, a real goal
    python tests/benchmarks/ppo.py frontier --data DIR --reward DIR --pairs FILE  PPO, DPO and best-of-n on that goal

PYTHON is the interpreter of an environment with `trl==1.12.0 transformers==5.17.0 torch==2.13.0 peft==0.21.2`,
`datasets` and `rich`. Each measurement is a process of its own on one thread; what counts is its CPU seconds
(other people's work on the same cores does not) and its peak resident memory. An iteration is one
repeat; medians over iterations are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"})

WIDTH, LAYERS, VOCABULARY, PROMPT, BATCH, EPOCHS = 512, 8, 32_000, 16, 32, 4
STOPS = 500
"""Of the 32,000 ids so many end an answer: with random weights one in 64 tokens does, so answers are of any length."""


def peak_megabytes() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


# --- the model --------------------------------------------------------------------------------------------------------


def write_models(folder: Path) -> None:
    """Write a policy, a reward model (whole weights, and an adapter on the policy), a tokenizer and prompts."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=1376,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=VOCABULARY - 1,
        eos_token_id=0,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "policy")
    config.num_labels = 1
    scorer = AutoModelForSequenceClassification.from_config(config)
    scorer.model.load_state_dict(model.model.state_dict())
    scorer.save_pretrained(folder / "reward")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token=f"w{VOCABULARY - 1}")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(folder / name)
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(STOPS, VOCABULARY - 1, (256, PROMPT), generator=draw).tolist()
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt_ids": row}) + "\n" for row in prompts))
    _write_reward_adapter(folder)


def _write_reward_adapter(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
    settings = LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
    )
    get_peft_model(plain, settings).save_pretrained(folder / "reward_adapter")
    file = folder / "reward_adapter" / "adapter_config.json"
    values = json.loads(file.read_text())
    values["base_model_name_or_path"] = "sha256:" + "b" * 64
    file.write_text(json.dumps(values))


def floor(new_tokens: float, value: str, tuning: str) -> float:
    """Return the billions of multiplications and additions that an episode cannot do without (2 a weight a token)."""
    trunk = 2 * LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * 1376)
    head = 2 * WIDTH * VOCABULARY
    length = PROMPT + new_tokens
    backward = 2 if tuning == "full" else 1
    read = trunk * length + head * new_tokens
    sampling, reading, scoring = read, 2 * read, trunk * length
    update = EPOCHS * (1 + backward) * read
    if value != "shared":
        scoring += trunk * length
        update += EPOCHS * (1 + backward) * trunk * length
    return (sampling + reading + scoring + update) / 1e9


# --- ours -------------------------------------------------------------------------------------------------------------


def ours(folder: Path, settings: dict[str, Any], iterations: int, budget: float | None = None) -> dict[str, Any]:
    """Run the stage's own trainer; return what each iteration cost."""
    import torch
    from transformers import PrinterCallback, TrainerCallback

    from align_pipeline.pipeline.stage import Resolved, Work
    from align_pipeline.stages import training
    from align_pipeline.stages.ppo import PPO

    torch.set_num_threads(1)
    settings = dict(settings)
    reward = settings.pop("reward_folder")
    policy = Resolved(ref="file:policy", digest="sha256:" + "b" * 64, path=settings.pop("policy_folder"))
    scorer = Resolved(ref="file:reward", digest="sha256:" + "c" * 64, path=reward)
    if (Path(reward) / "adapter_config.json").exists():
        scorer = scorer.model_copy(update={"adapter": reward, "base": policy})
    prompts = Resolved(ref="file:prompts", digest="sha256:" + "d" * 64, path=str(folder / "prompts.jsonl"))
    stage = PPO(policy="file:policy", reward="file:reward", prompts="file:prompts", **settings)
    work = Work(Path(tempfile.mkdtemp(dir=folder)) / "work" / "ppo")
    work.out.mkdir(parents=True)
    work.scratch.mkdir()
    inputs = {"policy": policy, "reward": scorer, "prompts": prompts}
    tokenizer = training.load_tokenizer(inputs, "policy")
    asked, held_out = stage.read_prompts(inputs, tokenizer, work)
    trainer = stage.trainer(inputs, work, tokenizer, asked, held_out)
    trainer.remove_callback(PrinterCallback)
    marks = [time.process_time()]
    answers: list[list[list[int]]] = []

    class Mark(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            marks.append(time.process_time())
            answers.append([list(ids) for ids in trainer.batch.answers])
            spent = marks[-1] - marks[0]
            control.should_training_stop = len(answers) >= iterations or (budget is not None and spent > budget)
            return control

    trainer.add_callback(Mark())
    trainer.train()
    phases = {name: round(seconds / len(answers), 2) for name, seconds in trainer.seconds.items()}
    trainer.actors.model.save_pretrained(folder / "out_ours")
    return {"marks": marks, "answers": answers, "peak": peak_megabytes(), "phases": phases, "batch": stage.batch_size}


# --- TRL 1.12 ---------------------------------------------------------------------------------------------------------


def theirs(folder: Path, settings: dict[str, Any], iterations: int, budget: float | None = None) -> dict[str, Any]:
    """Run TRL 1.12's PPOTrainer on the same prompts; return what each iteration cost."""
    import torch
    import trl.experimental.ppo.ppo_trainer as module
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        PrinterCallback,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(1)
    lora = settings["tuning"] == "lora"
    policy_folder, reward_folder = settings["policy_folder"], settings["reward_folder"]
    tokenizer = AutoTokenizer.from_pretrained(policy_folder, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "<unk>"

    def load(kind: Any, where: str, **more: Any) -> Any:
        return kind.from_pretrained(where, dtype=torch.float32, **more)

    policy, reference = load(AutoModelForCausalLM, policy_folder), None
    if not lora:
        reference = load(AutoModelForCausalLM, policy_folder)
    reward, value = (load(AutoModelForSequenceClassification, reward_folder, num_labels=1) for _ in range(2))
    rows = [json.loads(line)["prompt_ids"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    dataset = Dataset.from_dict({"input_ids": rows}).shuffle(seed=settings["seed"])
    size = settings["batch_size"]
    arguments = PPOConfig(
        output_dir=str(folder / "out_trl"),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        total_episodes=size * (iterations + 1),
        num_ppo_epochs=settings["epochs"],
        response_length=settings["max_new_tokens"],
        local_rollout_forward_batch_size=size,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        num_sample_generations=0,
        logging_steps=1,
        temperature=1.0,
        disable_tqdm=True,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        kl_coef=settings["kl_coef"],
        stop_token_id=settings.get("stop_token_id", 0),
        seed=settings["seed"],
        missing_eos_penalty=None,
        eval_strategy="no",
    )
    if "stops" in settings:
        stops = settings["stops"]

        def truncated(stop_token_id: int, pad_token_id: int, responses: Any) -> Any:
            ended = (responses < stops).cumsum(-1)
            return responses.masked_fill((ended - (responses < stops).long()) > 0, pad_token_id)

        module.truncate_response = truncated
    answers: list[list[list[int]]] = []
    generate = module.batch_generation

    def recorded(model: Any, queries: Any, *more: Any, **named: Any) -> Any:
        whole, logits = generate(model, queries, *more, **named)
        answers.append(whole[:, queries.shape[1] :].tolist())
        return whole, logits

    module.batch_generation = recorded
    marks = [0.0]

    class Done(Exception):
        pass

    class Mark(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            marks.append(time.process_time())
            if len(marks) > iterations or (budget is not None and marks[-1] - marks[0] > budget):
                raise Done

    settings_lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=dataset,
        eval_dataset=None,
        callbacks=[Mark()],
        peft_config=settings_lora if lora else None,
    )
    trainer.callback_handler.callbacks = [
        one for one in trainer.callback_handler.callbacks if not isinstance(one, PrinterCallback)
    ]
    marks[0] = time.process_time()
    with contextlib.suppress(Done):
        trainer.train()
    trained = trainer.model.policy
    peak = peak_megabytes()
    (trained.merge_and_unload() if lora else trained).save_pretrained(folder / "out_trl")
    return {"marks": marks, "answers": answers[: len(marks) - 1], "peak": peak, "phases": {}, "batch": size}


# --- speed ------------------------------------------------------------------------------------------------------------


def measure(
    python: str, folder: Path, who: str, settings: dict[str, Any], iterations: int, budget: float | None
) -> Any:
    """Run one measurement in a process of its own."""
    job = {"who": who, "folder": str(folder), "settings": settings, "iterations": iterations, "budget": budget}
    result = subprocess.run([python, __file__, "job", json.dumps(job)], capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(result.stdout[-2000:] + result.stderr[-4000:])
    return json.loads(lines[-1].removeprefix("RESULT "))


def speed(trl: str, iterations: int, only: str | None) -> None:
    """Print episodes per CPU second, peak memory and the floor, for equal and for unequal answers."""
    folder = Path(tempfile.mkdtemp(prefix="ppo-speed-"))
    write_models(folder)
    common: dict[str, Any] = {
        "policy_folder": str(folder / "policy"),
        "reward_folder": str(folder / "reward"),
        "tuning": "lora",
        "batch_size": BATCH,
        "epochs": EPOCHS,
        "learning_rate": 1e-5,
        "kl_coef": 0.05,
        "seed": 0,
    }
    adapter = {
        **common,
        "reward_folder": str(folder / "reward_adapter"),
        "lora": {"r": 16, "alpha": 32},
        "minibatches": 1,
        "missing_eos_penalty": 0.0,
        "evaluation_prompts": 0,
        "schedule": "constant",
        "episodes": BATCH * 100,
    }
    print(f"{'':34}episodes/CPU s   floor GFLOP   peak MB   tokens   seconds by phase")
    for new, stops in ((64, 1), (256, STOPS)):
        generation = folder / "policy" / "generation_config.json"
        values = json.loads(generation.read_text())
        values["eos_token_id"] = list(range(stops))
        generation.write_text(json.dumps(values))
        cases = [
            ("TRL 1.12, LoRA policy", trl, "theirs", {**common, "stops": stops}, "fresh"),
            ("TRL 1.12, full", trl, "theirs", {**common, "stops": stops, "tuning": "full"}, "fresh"),
            ("ours, value adapter", sys.executable, "ours", {**adapter, "value": "reward"}, "reward"),
            ("ours, value: shared", sys.executable, "ours", {**adapter, "value": "shared"}, "shared"),
        ]
        for name, python, who, settings, value in cases:
            if only and only not in f"{new} {name}":
                continue
            found = measure(python, folder, who, {**settings, "max_new_tokens": new}, iterations, None)
            spent = [b - a for a, b in zip(found["marks"], found["marks"][1:], strict=False)]
            lengths = [_length(ids, stops) for batch in found["answers"] for ids in batch]
            mean = statistics.fmean(lengths)
            rate = BATCH / statistics.median(spent)
            least = floor(mean, value, settings["tuning"])
            row = f"{PROMPT}+{new:<4} {name:26} {rate:14.3f} {least:13.1f} {found['peak']:9} {mean:8.1f}"
            print(f"{row}   {found['phases']}", flush=True)


def _length(ids: list[int], stops: int) -> int:
    return next((i + 1 for i, token in enumerate(ids) if token < stops), len(ids))


# --- a real goal ------------------------------------------------------------------------------------------------------


def stories(data: Path, reward: Path, trl: str, seconds: float, seeds: int) -> None:
    """Print gold, KL and distinct-2 after the same CPU seconds, and how soon gold 0.8 and 0.9 were reached.

    The goal, the prompts and the evaluation are those of `tests/test_real.py`: stories of a 260K-parameter model, gold
    is VADER's compound of the continuation. The reward model is one and the same file for all.
    """
    from stories import evaluate, gold_of, write_prompts

    folder = Path(tempfile.mkdtemp(prefix="ppo-stories-"))
    write_prompts(data, folder / "prompts.jsonl")
    common: dict[str, Any] = {
        "policy_folder": str(data / "models" / "stories260K"),
        "reward_folder": str(reward),
        "tuning": "full",
        "batch_size": 64,
        "epochs": 4,
        "learning_rate": 3e-4,
        "kl_coef": 0.1,
        "max_new_tokens": 96,
    }
    equal = {**common, **ENDLESS, "value": "reward", "minibatches": 1, "schedule": "constant", "episodes": 64 * 2000}
    best = {**_defaults(data, reward), "episodes": 64 * 38}
    cases = [
        ("TRL 1.12", trl, "theirs", {**common, "stop_token_id": 1}),
        ("ours, TRL's settings", sys.executable, "ours", equal),
        ("ours, our defaults", sys.executable, "ours", best),
        ("ours, kl_coef 0.03", sys.executable, "ours", {**best, "learning_rate": 2e-4, "kl_coef": 0.03}),
    ]
    for name, python, who, settings in cases:
        for seed in range(seeds):
            found = measure(python, folder, who, {**settings, "seed": seed}, 10_000, seconds)
            spent = [mark - found["marks"][0] for mark in found["marks"][1:]]
            golds = [gold_of(data, batch) for batch in found["answers"]]
            out = folder / ("out_trl" if who == "theirs" else "out_ours")
            reached = {goal: _reached(spent, golds, goal, 256 // found["batch"]) for goal in (0.8, 0.9)}
            count = found["batch"] * len(spent)
            print(
                json.dumps(
                    {
                        "who": name,
                        "seed": seed,
                        **evaluate(data, out),
                        "episodes": count,
                        "cpu_seconds": round(spent[-1], 1),
                        "episodes_per_cpu_second": round(count / spent[-1], 2),
                        "peak_megabytes": found["peak"],
                        "cpu_seconds_to_gold": reached,
                    }
                ),
                flush=True,
            )


ENDLESS = {"missing_eos_penalty": 0.0, "evaluation_prompts": 0}
"""These stories have no end of their own: 96 tokens are what there is."""


def _defaults(data: Path, reward: Path) -> dict[str, Any]:
    """Return the stage's defaults, with whole weights and a learning rate for so small a model."""
    return {
        "policy_folder": str(data / "models" / "stories260K"),
        "reward_folder": str(reward),
        "tuning": "full",
        "learning_rate": 3e-4,
        "max_new_tokens": 96,
        **ENDLESS,
    }


def frontier(data: Path, reward: Path, pairs: Path) -> None:
    """Print gold, KL and distinct-2 of PPO at several kl_coef, of DPO at several beta, and of best-of-n."""
    from stories import best_of_n, evaluate, write_prompts

    folder = Path(tempfile.mkdtemp(prefix="ppo-frontier-"))
    write_prompts(data, folder / "prompts.jsonl")
    for kl_coef in (0.2, 0.1, 0.05, 0.03):
        settings = {**_defaults(data, reward), "kl_coef": kl_coef, "episodes": 64 * 38, "seed": 0}
        measure(sys.executable, folder, "ours", settings, 10_000, None)
        print(json.dumps({"who": "PPO", "kl_coef": kl_coef, **evaluate(data, folder / "out_ours")}), flush=True)
    for beta in (0.5, 0.2, 0.1):
        dpo(folder, data / "models" / "stories260K", pairs, beta)
        print(json.dumps({"who": "DPO", "beta": beta, **evaluate(data, folder / "dpo" / "model")}), flush=True)
    for n, row in best_of_n(data, reward, (1, 2, 4, 8, 16)).items():
        print(json.dumps({"who": "best of n by the reward model", "n": n, **row}), flush=True)


def dpo(folder: Path, base: Path, pairs: Path, beta: float) -> None:
    """Train the DPO stage on pairs of token ids and leave its model in `folder/dpo/model`."""
    from align_pipeline.pipeline.stage import Resolved, Work
    from align_pipeline.stages.dpo import DPO

    stage = DPO(
        policy="file:base",
        data="file:pairs",
        tuning="full",
        beta=beta,
        learning_rate=3e-4,
        warmup=0.08,
        batch_size=16,
        held_out=0,
        how={"micro_batch": 16},
    )
    work = Work(Path(tempfile.mkdtemp(dir=folder)) / "work" / "dpo")
    work.out.mkdir(parents=True)
    work.scratch.mkdir()
    inputs = {
        "policy": Resolved(ref="file:base", digest="sha256:" + "b" * 64, path=str(base)),
        "data": Resolved(ref="file:pairs", digest="sha256:" + "d" * 64, path=str(pairs)),
    }
    stage.run(inputs, work)
    target = folder / "dpo"
    target.unlink(missing_ok=True)
    target.symlink_to(work.out)


def _reached(spent: list[float], golds: list[float], goal: float, window: int) -> float | None:
    """Return the CPU seconds after which the mean gold of the last 256 answers reached the goal."""
    for i in range(window - 1, len(golds)):
        if statistics.fmean(golds[i - window + 1 : i + 1]) >= goal:
            return round(spent[i], 1)
    return None


def main() -> None:
    if sys.argv[1:2] == ["job"]:
        job = json.loads(sys.argv[2])
        run = ours if job["who"] == "ours" else theirs
        found = run(Path(job["folder"]), job["settings"], job["iterations"], job["budget"])
        print("RESULT " + json.dumps(found))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "stories", "frontier"))
    parser.add_argument("--trl", default=sys.executable, help="interpreter of an environment with trl 1.12")
    parser.add_argument("--data", type=Path, help="folder with models/stories260K and tinystories/")
    parser.add_argument("--reward", type=Path, help="reward model on stories260K, whole weights")
    parser.add_argument("--pairs", type=Path, help="JSONL of prompt_ids, chosen_ids and rejected_ids, ordered by gold")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=62.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="measure only the rows whose name contains this")
    given = parser.parse_args()
    if given.what == "speed":
        speed(given.trl, given.iterations, given.only)
    elif given.what == "frontier":
        frontier(given.data, given.reward, given.pairs)
    else:
        stories(given.data, given.reward, given.trl, given.seconds, given.seeds)


if __name__ == "__main__":
    main()
