r"""Proximal policy optimisation (PPO): the model learns to write answers that a reward model scores high.

Reads   --sft_model_path      the merged SFT model: policy, and the reference that it stays near
        --reward_model_path   a reward adapter trained on that model (one base carries everything), or a
                              merged reward model of any base; or --reward_function FILE.py:NAME
        --train_file_dir      .jsonl/.json conversations: each up to its last answer is a prompt, with history
Writes  --output_dir          the policy's LoRA adapter, tokenizer, run.json, results, logs/, checkpoint-N/
Next    merge_peft_adapter.py, then inference.py

    bash run_ppo.sh
    python ppo_training.py --sft_model_path merged-sft-qwen-v1 --reward_model_path outputs-rm-qwen-v1 \
        --train_file_dir data/finetune

Method: Schulman et al. (arXiv:1707.06347) as used by Ouyang et al. (arXiv:2203.02155): the numbered steps of
`PPOTrainer.update` and the equations before it. Policy, value function and reward model are adapters with
small heads on one base, the reference is the base alone. Dropout is off throughout. --algorithm rloo: no
value function; the baseline of an answer is the mean of the others to its prompt (Ahmadian et al.,
arXiv:2402.14740), under PPO's clipped update.
"""

from dataclasses import dataclass, field
from pathlib import Path

from medicalgpt.arguments import ModelArguments, parse_stage
from medicalgpt.backbone import Backbone
from medicalgpt.base import open_base
from medicalgpt.dataset import load_data
from medicalgpt.errors import run_script
from medicalgpt.experience import Experience
from medicalgpt.flags import require, require_positive
from medicalgpt.kinds import parse_question
from medicalgpt.model_files import resolve_model_dir
from medicalgpt.questions import encode_questions, report_questions
from medicalgpt.rewards import FunctionScorer, ScoreScale, make_scorer, reward_identity, shares_base
from medicalgpt.rl_trainer import RLTrainer, answers_per_update
from medicalgpt.stage import (
    build_model,
    chat_encoder,
    choose_activation_checkpointing,
    open_run,
    run_training,
)

import torch

ALGORITHMS = ("ppo", "rloo")


@dataclass
class PolicyArguments(ModelArguments):
    """What is trained: the merged SFT model."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "the same as --sft_model_path"})
    sft_model_path: str | None = field(
        default=None, metadata={"help": "merged SFT model: the policy's base and the reference"}
    )

    def __post_init__(self):
        super().__post_init__()
        require(
            (self.sft_model_path is None) != (self.model_name_or_path is None),
            "give the merged SFT model as --sft_model_path DIR",
        )
        self.model_name_or_path = self.sft_model_path = self.sft_model_path or self.model_name_or_path


@dataclass
class PPOArguments:
    """What only PPO has.

    Answers per update: --per_device_train_batch_size × --gradient_accumulation_steps × processes ×
    --num_mini_batches.
    """

    reward_model_path: str | None = field(
        default=None, metadata={"help": "adapter of a reward model, or a merged reward model"}
    )
    reward_function: str | None = field(
        default=None, metadata={"help": "FILE.py:NAME of a function of prompt and response, in its place"}
    )
    algorithm: str = field(default="ppo", metadata={"help": "ppo, or rloo (no value function)"})
    num_generations: int = field(default=4, metadata={"help": "answers per prompt of an update"})
    max_completion_length: int = field(default=128, metadata={"help": "limit of an answer, in tokens"})
    temperature: float = field(default=0.7, metadata={"help": "of sampling; divides the logits"})
    num_ppo_epochs: int = field(default=2, metadata={"help": "passes over the answers of an update"})
    num_mini_batches: int = field(default=2, metadata={"help": "optimizer steps per pass"})
    cliprange: float = field(default=0.2, metadata={"help": "a ratio beyond 1 ± this gains no more"})
    cliprange_value: float = field(default=0.2, metadata={"help": "how far a value may move for its loss"})
    vf_coef: float = field(default=0.5, metadata={"help": "weight of the value loss"})
    entropy_coef: float = field(default=0.0, metadata={"help": "weight of the entropy bonus"})
    gamma: float = field(default=1.0, metadata={"help": "discount per token"})
    lam: float = field(default=0.95, metadata={"help": "λ of GAE; 1: the values are only a baseline"})
    whiten_rewards: bool = field(
        default=False, metadata={"help": "scale the rewards of tokens to unit variance"}
    )
    normalize_scores: bool | None = field(
        default=None,
        metadata={"help": "by the first update's mean and spread; default: those of a reward model"},
    )
    kl_coef: float = field(default=0.07, metadata={"help": "penalty per nat away from the reference"})
    target_kl: float = field(
        default=6.0,
        metadata={"help": "nats per answer that the penalty is adapted to; 0: it stays as it is"},
    )
    kl_horizon: int = field(default=1000, metadata={"help": "answers over which the penalty is adapted"})
    early_stop_kl: float = field(
        default=0.1, metadata={"help": "nats per token from the sampling policy that end an update's passes"}
    )
    missing_eos_penalty: float = field(
        default=1.0,
        metadata={"help": "taken off the (normalised) score of an answer that did not end by itself"},
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "of the value function; default: --learning_rate"}
    )
    sample_steps: int = field(default=10, metadata={"help": "updates between tables of held-out answers"})
    num_sample_prompts: int = field(default=4, metadata={"help": "prompts of that table"})

    def __post_init__(self):
        require(
            (self.reward_model_path is None) != (self.reward_function is None),
            "give --reward_model_path DIR or --reward_function FILE.py:NAME, exactly one of them",
        )
        require(
            self.algorithm in ALGORITHMS,
            f"--algorithm {self.algorithm} is not known; choose from {', '.join(ALGORITHMS)}",
        )
        if self.normalize_scores is None:
            self.normalize_scores = self.reward_model_path is not None
        require_positive(
            self,
            "num_generations",
            "max_completion_length",
            "num_ppo_epochs",
            "num_mini_batches",
            "kl_horizon",
            "sample_steps",
            "num_sample_prompts",
        )
        require(
            self.algorithm == "ppo" or self.num_generations > 1,
            f"--num_generations {self.num_generations}: rloo compares answers to one prompt; expected 2 or "
            "more",
        )
        for name in ("temperature", "cliprange", "cliprange_value", "early_stop_kl"):
            value = getattr(self, name)
            require(value > 0, f"--{name} {value} is not allowed; expected more than 0")
        for name in ("kl_coef", "vf_coef", "entropy_coef", "missing_eos_penalty", "target_kl"):
            value = getattr(self, name)
            require(value >= 0, f"--{name} {value} is not allowed; expected 0 or more")
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"--{name} {value} is not allowed; expected 0 to 1")


SUFFIXES = (".jsonl", ".json")
DEFAULTS = {
    "output_dir": "outputs-ppo-qwen-v1",
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 64,
    "num_train_epochs": 1.0,
    "learning_rate": 3e-4,
    "lora_dropout": 0.0,
    "weight_decay": 0.0,
    "max_source_length": 512,
    "max_eval_samples": 32,
}


# ---- the equations: (R, T) is R answers of up to T tokens, mask (R, T) is 1 on their tokens ----------------


def token_rewards(
    scores: torch.Tensor, log_ratios: torch.Tensor, mask: torch.Tensor, kl_coef: float
) -> torch.Tensor:
    """Return r_t = − β (log π(y_t) − log ref(y_t)), and the score on top of the last token, (R, T).

    Args:
        scores: (R,). log_ratios: log π − log ref, (R, T).
    """
    rewards = -kl_coef * log_ratios * mask
    last = mask.sum(1).long() - 1
    rewards[torch.arange(len(scores)), last] += scores
    return rewards


def advantages_and_returns(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} − V_t, and A_t + V_t, (R, T) each.

    Generalised advantage estimation, arXiv:1506.02438, eq. 16; behind its end an answer is worth nothing.
    """
    advantages, last, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        last = (delta + gamma * lam * last) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = last
    return advantages, (advantages + values) * mask


def leave_one_out(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Return each answer's total reward less the mean of the others to its prompt, (R,); arXiv:2402.14740.

    Args:
        rewards: of whole answers, those to one prompt side by side, (R,).
    """
    groups = rewards.view(-1, num_generations)
    others = (groups.sum(1, keepdim=True) - groups) / (num_generations - 1)
    return (groups - others).flatten()


def policy_losses(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return max(− A ρ, − A clip(ρ, 1 ± ε)) with ρ = π / π_old, and where the clip decides, (N,) each.

    arXiv:1707.06347, eq. 7.
    """
    ratio = (logps - old_logps).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(plain, clipped), (clipped > plain).float()


def value_losses(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ½ max((V − R)², (clip(V, V_old ± ε) − R)²), and where the clip decides, (N,) each."""
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    plain_loss, clipped_loss = (values - returns) ** 2, (clipped - returns) ** 2
    return 0.5 * torch.maximum(plain_loss, clipped_loss), (clipped_loss > plain_loss).float()


def adapted_kl_coef(kl_coef: float, kl: float, target_kl: float, num_answers: int, horizon: int) -> float:
    """Return β (1 + clip(KL / target − 1, ± 0.2) · answers / horizon); arXiv:1909.08593, section 2.2."""
    error = min(max(kl / target_kl - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_answers / horizon)


class PPOTrainer(RLTrainer):
    """PPO, and RLOO under the same clipped update."""

    def update(self, step: int) -> dict[str, float]:
        """Make one update and return its metrics."""
        options: PPOArguments = self.options
        # 1. Prompts, and answers drawn from the policy
        places, rollouts = self.draw(step)
        # 2. Scores, in standard deviations of the first update's; an answer that never ends pays for it
        scores = self.scores(rollouts)
        self.score_scale = self.score_scale or ScoreScale.of(scores, self.means)
        ended = torch.tensor([rollout.draw.ended for rollout in rollouts], device=scores.device)
        scored = self.score_scale(scores) - options.missing_eos_penalty * ~ended
        # 3. Log-probabilities of policy and reference, values
        experience = self.evaluate_answers(rollouts)
        # 4. A reward per token: the KL penalty, and the score at the last
        log_ratios = (experience.logps - experience.reference_logps) * experience.mask
        rewards = token_rewards(scored, log_ratios, experience.mask, self.kl_coef)
        totals = rewards.sum(1)
        if options.whiten_rewards:
            rewards = self.means.whiten(rewards, experience.mask, keep_mean=True)
        # 5. Advantages: GAE, or against the other answers to the prompt
        if options.algorithm == "ppo":
            advantages, experience.returns = advantages_and_returns(
                rewards, experience.values, experience.mask, options.gamma, options.lam
            )
        else:
            every = torch.zeros(self.num_rollouts, device=self.device)
            every[places] = rewards.sum(1)
            every = leave_one_out(self.means.add_up(every), options.num_generations)
            advantages = every[places][:, None] * experience.mask
        # 6. Whitened over the whole batch
        experience.advantages = self.means.whiten(advantages, experience.mask)
        # 7. Passes of clipped updates
        metrics = self.passes(step, places, rollouts, experience)
        # 8. The penalty follows the distance from the reference
        kls = log_ratios.sum(1)
        kl = self.means.mean(kls)
        metrics |= {
            "score": self.means.mean(scores),
            "score_std": self.means.std(scores),
            "kl": kl,
            "kl_coef": self.kl_coef,
            "reward": self.means.mean(totals),
            "response_length": self.means.mean(experience.mask.sum(1)),
            "ended": self.means.mean(ended.float()),
        }
        if options.target_kl > 0:
            self.kl_coef = adapted_kl_coef(
                self.kl_coef, kl, options.target_kl, self.num_rollouts, options.kl_horizon
            )
        return metrics

    def policy_loss(self, experience: Experience, rows: list[int], batch: dict) -> dict[str, torch.Tensor]:
        """Return sums over the tokens of some answers: "loss" (with gradient) and metrics."""
        options: PPOArguments = self.options
        logps, entropies = self.backbone.logps(batch, entropy_has_gradient=options.entropy_coef > 0)
        old, advantages = experience.flat("logps", rows), experience.flat("advantages", rows)
        losses, clipped = policy_losses(logps, old, advantages, options.cliprange)
        log_ratio = (logps - old).detach()
        return {
            "loss": (losses - options.entropy_coef * entropies).sum(),
            "policy_loss": losses.detach().sum(),
            "entropy": entropies.detach().sum(),
            "clip_fraction": clipped.sum(),
            # Schulman's estimator of KL(old ‖ new): never negative, unbiased (joschu.net/blog/kl-approx.html)
            "update_kl": (log_ratio.exp() - 1 - log_ratio).sum(),
        }

    def value_loss(self, experience: Experience, rows: list[int], batch: dict) -> dict[str, torch.Tensor]:
        """Return sums over the tokens of some answers: "loss" (with gradient) and metrics."""
        options: PPOArguments = self.options
        losses, clipped = value_losses(
            self.backbone.values(batch),
            experience.flat("values", rows),
            experience.flat("returns", rows),
            options.cliprange_value,
        )
        return {
            "loss": options.vf_coef * losses.sum(),
            "value_loss": losses.detach().sum(),
            "value_clip_fraction": clipped.sum(),
        }


def main(argv: list[str]) -> None:
    """Train, or continue training, as the flags say."""
    # 1. Flags
    flags = parse_stage(argv, PPOArguments, __doc__, DEFAULTS, model=PolicyArguments)
    require(flags.adapter.use_peft, "--use_peft False: policy and value function are adapters on one base")
    options = flags.own
    answers_per_update(flags.run, options)

    # 2. Data and the source of the scores, checked before a model is loaded
    data = load_data(flags, parse_question, SUFFIXES)
    base = open_base(flags)
    reward_dir, function = None, None
    if options.reward_model_path:
        reward_dir = resolve_model_dir(
            options.reward_model_path, "--reward_model_path", flags.model.cache_dir
        )
        shared = shares_base(Path(reward_dir), base.directory, base.template_name)
    else:
        function, shared = FunctionScorer.load(options.reward_function), False

    # 3. The run: new, to be continued, or done
    record = open_run("ppo", flags, base, data, also=reward_identity(reward_dir, options.reward_function))
    if record is None:
        return

    # 4. Prompts → ids
    encoder = chat_encoder(flags, base)
    prompts = encode_questions(encoder, data.train, data.log)
    held_out = encode_questions(encoder, data.validation, data.log)
    report_questions(prompts, held_out, data, base.tokenizer)

    # 5. One base, with adapters for policy, value function and reward
    longest = encoder.max_source_length + options.max_completion_length
    batch = flags.run.per_device_train_batch_size
    backbone = Backbone(build_model(flags, base, max_length=longest), temperature=options.temperature)
    if shared:
        backbone.add_reward(Path(reward_dir))
    if options.algorithm == "ppo":
        backbone.add_value()
    backbone.to(flags.run.device)
    choose_activation_checkpointing(backbone.model, flags.run, [{"input_ids": range(longest)}] * batch)

    # 6. Train, evaluate, save
    trainer = PPOTrainer(
        backbone=backbone,
        scorer=make_scorer(
            backbone,
            None if shared else reward_dir,
            function,
            flags,
            stop_id=base.chat_format.stop_ids(base.tokenizer)[0],
        ),
        args=flags.run,
        options=options,
        record=record,
        base=base,
        prompts=prompts,
        held_out=held_out,
    )
    run_training(trainer, record, base)


if __name__ == "__main__":
    run_script(main, resumable=True)
