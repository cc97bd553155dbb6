"""The hooks of a live model in transformers' Trainer.

    Trainer(model=live, …, callbacks=[training(live).callback()])

A penalty's gradient is added to the step's once, after clipping and whatever the number of micro-batches; the loss that Trainer logs is the
task's alone. A pass with a loss of its own adds to the model's in training mode, where Trainer's inputs are at hand.
"""

import torch
import transformers

from ..errors import Refused
from ..store.folder import unwrapped


def callback(training):
    """A TrainerCallback for one Training."""
    return _Hooks(training)


class _Hooks(transformers.TrainerCallback):
    def __init__(self, training):
        self.training, self._handle = training, None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        live = self.training.live
        if unwrapped(model, "training") is not live:
            raise Refused("training: this Trainer trains another model than the callback is for. Make the callback of the model that you give to Trainer.")
        if self.training._only("step") is not None:
            raise Refused("training: a pass of this model takes steps of its own, which Trainer has no place for. Use a plain loop: training(live).step(optimizer, …).")
        if args.fp16 and not args.max_grad_norm:
            raise Refused("training: with fp16 and max_grad_norm=0 Trainer leaves gradients scaled where hooks see them. Use bf16, or a max_grad_norm.")
        if getattr(args, "deepspeed", None):
            raise Refused("training: DeepSpeed's engine hides gradients and the optimizer's step from hooks. Use DDP or FSDP.")
        self._refuse_equal_rates(optimizer)
        if self.training._only("loss") is not None:
            self._handle = live.register_forward_hook(self._with_own_loss(args.gradient_accumulation_steps), with_kwargs=True)

    def _refuse_equal_rates(self, optimizer):
        rates = {id(p): group.get("initial_lr", group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        parameters = dict(self.training.live.named_parameters())
        factors = {path: factor for path, factor in self.training.factors().items() if id(parameters.get(path)) in rates}
        lowest = min(rates.values(), default=0.0)
        for path, factor in factors.items():
            usual = next((rates[id(p)] for name, p in parameters.items() if name not in factors and id(p) in rates), lowest)
            if abs(rates[id(parameters[path])] - factor * usual) > 1e-6 * factor * usual:
                raise Refused(
                    f"training: {path} was to have {factor} times the learning rate of others, and Trainer's optimizer does not.\n"
                    "Give it the optimizer: Trainer(…, optimizers=(training(live).optimizer(torch.optim.AdamW, lr=…), None))."
                )

    def _with_own_loss(self, accumulation):
        def hook(module, args, kwargs, output):
            if not module.training or not torch.is_grad_enabled() or output.get("loss") is None:
                return None
            outputs = iter((output,))
            own = self.training.loss(lambda: next(outputs, None) or module.forward(*args, **kwargs))
            # with `num_items_in_batch` the model's loss is its share of the whole step, and Trainer does not divide it
            output["loss"] = output["loss"] + (own - output["loss"]) / (accumulation if kwargs.get("num_items_in_batch") is not None else 1)
            return output

        return hook

    def on_train_end(self, args, state, control, **kwargs):
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.training.before_forward()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.training.after_backward()

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.training.after_step(optimizer)
