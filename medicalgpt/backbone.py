"""One base in memory for PPO: policy, value and reward are adapters with small heads, the reference is none.

adapter   head                  gives
default   the vocabulary        the policy's log-probabilities; saved like any stage's adapter
(off)     the vocabulary        the reference's: what the base says without adapters
value     linear, fp32          the value before every token of an answer
reward    linear, fp32, frozen  the score of an answer at its last token; only with a reward adapter
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from medicalgpt.engine import FlatLM
from medicalgpt.errors import ModelError
from medicalgpt.model_files import adapter_settings
from medicalgpt.modeling import ADAPTER_FILE, adapter_weights

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

POLICY, VALUE, REWARD = "default", "value", "reward"
HEAD = "base_model.model.score.weight"  # of a reward adapter's file


class Backbone(nn.Module):
    """A FlatLM whose adapters are policy, value and reward.

    Args:
        model: the policy: a base with its adapter.
        temperature: that answers are sampled with; log-probabilities are of the distribution sampled from.
    """

    def __init__(self, model: FlatLM, *, temperature: float):
        super().__init__()
        self.model = model
        self.temperature = temperature
        size = model.config.get_text_config().hidden_size
        self.value_head = nn.Linear(size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.score_head: nn.Linear | None = None
        self.active = POLICY  # the adapter that computes

    @property
    def lm(self) -> PeftModel:
        """The base with its adapters."""
        return self.model.lm

    # ---- adapters ------------------------------------------------------------------------------------------

    def add_reward(self, directory: Path) -> None:
        """Load the adapter and the head of a reward model that was trained on this base, and freeze them.

        Raises:
            ModelError: it has no head, trains more than adapters, or does not fit.
        """
        settings, weights = adapter_settings(directory), adapter_weights(directory)
        if HEAD not in weights:
            raise ModelError(
                f"{directory} has no score head ({HEAD}); expected an adapter of reward_modeling.py"
            )
        others = set(settings.get("modules_to_save") or ()) - {"score", "classifier"}
        if others:
            raise ModelError(
                f"{directory}: trains {', '.join(sorted(others))} in full, which cannot share a base; merge "
                "it (merge_peft_adapter.py) and give the merged reward model"
            )
        self.score_head = nn.Linear(weights[HEAD].shape[1], 1, bias=False)
        self.score_head.weight.data = weights.pop(HEAD).float()
        config = LoraConfig.from_pretrained(str(directory))
        config.task_type = config.modules_to_save = None
        self.add_adapter(REWARD, config, weights, directory)
        self.score_head.requires_grad_(False)

    def add_value(self) -> None:
        """Add the value adapter: it starts as the reward adapter (arXiv:2203.02155), or new without one.

        The head starts at zero: the reward model's own says something at an answer's last token only.
        """
        if self.score_head is None:
            policy = self.lm.peft_config[POLICY]
            config = LoraConfig(
                r=policy.r, lora_alpha=policy.lora_alpha, target_modules=policy.target_modules
            )
            self.add_adapter(VALUE, config)
            return
        weights = get_peft_model_state_dict(self.lm, adapter_name=REWARD, save_embedding_layers=False)
        config = LoraConfig(**{
            name: getattr(self.lm.peft_config[REWARD], name)
            for name in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")
        })  # fmt: skip
        self.add_adapter(VALUE, config, {name: w.clone() for name, w in weights.items()})

    def add_adapter(
        self, name: str, config: LoraConfig, weights: dict | None = None, origin: Path | str = ""
    ) -> None:
        """Put another adapter on the base.

        Raises:
            ModelError: its weights do not fit.
        """
        self.lm.add_adapter(name, config)
        if weights is not None:
            self.put(name, weights, origin)
        for part, parameter in self.lm.named_parameters():
            if f".{name}." in part:
                parameter.data = parameter.data.float()
        self.train(self.training)  # new layers begin in training mode

    def put(self, name: str, weights: dict, origin: Path | str) -> None:
        """Put weights into an adapter.

        Raises:
            ModelError: they do not fit.
        """
        try:
            result = set_peft_model_state_dict(self.lm, weights, adapter_name=name)
        except RuntimeError as error:
            text = " ".join(str(error).split())
            raise ModelError(f"{origin} does not fit this base: {text[:200]}") from None
        missing = [key for key in result.missing_keys if f".{name}." in key and "lora_" in key]
        wrong = result.unexpected_keys or missing
        if wrong:
            more = len(wrong) - 1
            raise ModelError(f"{origin} does not fit this base: {wrong[0]} and {more} more weights")

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """Return what is trained of the policy or the value function."""
        adapter = [p for part, p in self.lm.named_parameters() if f".{name}." in part and "lora_" in part]
        return adapter + (list(self.value_head.parameters()) if name == VALUE else [])

    def freeze_all_but(self, *names: str) -> None:
        """Let these adapters be trained, and nothing else."""
        self.requires_grad_(False)
        for name in names:
            for parameter in self.parameters_of(name):
                parameter.requires_grad_(True)

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Compute with one adapter; None: with the bare base.

        A backward pass belongs inside: activation checkpointing computes again with the adapter of that time.
        """
        before, needs = self.active, [parameter.requires_grad for parameter in self.parameters()]

        def restore() -> None:  # the library decides anew what is trained whenever adapters change
            for parameter, need in zip(self.parameters(), needs, strict=True):
                parameter.requires_grad_(need)

        try:
            if name is None:
                with self.lm.disable_adapter():
                    yield
            else:
                self.lm.base_model.set_adapter(name)
                self.active = name
                restore()
                yield
        finally:
            self.lm.base_model.set_adapter(before)
            self.active = before
            restore()

    # ---- what they say -------------------------------------------------------------------------------------

    def logps(self, batch: dict, *, entropy_has_gradient: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities and entropies of the answers' tokens under the policy, (N,) fp32 each."""
        with self.using(POLICY):
            return self.model.logps_and_entropies(
                temperature=self.temperature, entropy_has_gradient=entropy_has_gradient, **batch
            )

    @torch.no_grad()
    def reference_logps(self, batch: dict) -> torch.Tensor:
        """Return log-probabilities of the answers' tokens under the base alone, (N,) fp32."""
        with self.using(None):
            return self.model.logps_and_entropies(
                temperature=self.temperature, entropy_has_gradient=False, **batch
            )[0]

    def values(self, batch: dict) -> torch.Tensor:
        """Return the value of what stands before every token of the answers, (N,) fp32."""
        with self.using(VALUE):
            return self.head(self.value_head, batch, batch["source_index"])

    @torch.no_grad()
    def scores(self, batch: dict) -> torch.Tensor:
        """Return the reward model's score of every answer at its last token, (S,) fp32."""
        with self.using(REWARD):
            return self.head(self.score_head, batch, batch["last_index"])

    def head(self, head: nn.Linear, batch: dict, places: torch.Tensor) -> torch.Tensor:
        """Apply a linear head to the hidden states at some positions, (n,) fp32."""
        with self.model.autocast(places.device):
            hidden = self.model.hidden_states(**batch)[places]
        return head(hidden.float())[:, 0]

    # ---- files ---------------------------------------------------------------------------------------------

    def save_policy(self, directory: Path) -> None:
        """Write the policy as any stage writes its adapter."""
        self.lm.save_pretrained(str(directory), selected_adapters=[POLICY], save_embedding_layers=False)
        (directory / "README.md").unlink(missing_ok=True)

    def save(self, directory: Path, *, with_value: bool) -> None:
        """Write the policy, and the value function into a file of its own."""
        self.save_policy(directory)
        if with_value:
            save_file(self.value_state(), directory / "value.safetensors")

    def value_state(self) -> dict[str, torch.Tensor]:
        """Return the weights of the value function."""
        state = get_peft_model_state_dict(self.lm, adapter_name=VALUE, save_embedding_layers=False)
        head = {f"value_head.{name}": value for name, value in self.value_head.state_dict().items()}
        return {name: value.detach().cpu().contiguous().clone() for name, value in (state | head).items()}

    def load(self, directory: Path, *, with_value: bool) -> None:
        """Put a checkpoint's policy and value function back.

        Raises:
            ModelError: they do not fit.
        """
        self.put(POLICY, load_file(directory / ADAPTER_FILE), directory)
        if not with_value:
            return
        value = load_file(directory / "value.safetensors")
        head = {
            name.removeprefix("value_head."): value.pop(name) for name in list(value) if "value_head" in name
        }
        self.value_head.load_state_dict(head)
        self.put(VALUE, value, directory)


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Let training mode compute as evaluation does: old and new log-probabilities must be comparable."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_pdrop"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
