"""Training frameworks take ``trainer.optimizer`` for an optimizer of torch: pip install '.[frameworks]'."""

import copy

import pytest
import torch

import tensorkv
from tests.trainer import optimizer_programs as programs

MODES = [True, False]


def _expected(steps, rates):
    """The weights after some steps of torch alone."""
    model = programs.make_model()
    optimizer = torch.optim.AdamW(programs.groups_of(model), lr=0.02)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(steps):
        optimizer.zero_grad()
        programs.loss_of(model, *programs.make_batch(step)).backward()
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == rates
    return model


def _check(model, trainer, steps=6):
    expected = _expected(steps, [group["lr"] for group in trainer.param_groups])
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-5, atol=1e-7)


def _trainer(model, kv, update_on_store):
    return tensorkv.Trainer(
        model, kv, "adamw", lr=0.02, param_groups=programs.groups_of(model), update_on_store=update_on_store
    )


@pytest.mark.parametrize("update_on_store", MODES)
def test_accelerate(update_on_store):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = programs.make_model()
    with tensorkv.create() as kv:
        trainer = _trainer(model, kv, update_on_store)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.9)
        prepared, optimizer, scheduler = accelerator.prepare(model, trainer.optimizer, scheduler)
        for step in range(6):
            optimizer.zero_grad()
            accelerator.backward(programs.loss_of(prepared, *programs.make_batch(step)))
            optimizer.step()
            scheduler.step()
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        _check(model, trainer)


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("update_on_store", MODES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_lightning(update_on_store, automatic, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, trainer, model):
            super().__init__()
            self.model, self.store_trainer = model, trainer
            self.automatic_optimization = automatic

        def training_step(self, batch, index):
            loss = programs.loss_of(self.model, *batch)
            if not automatic:
                optimizer, scheduler = self.optimizers(), self.lr_schedulers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                scheduler.step()
            return loss

        def configure_optimizers(self):
            optimizer = self.store_trainer.optimizer
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    model = programs.make_model()
    batches = [programs.make_batch(step) for step in range(6)]
    with tensorkv.create() as kv:
        trainer = _trainer(model, kv, update_on_store)
        fit = lightning.Trainer(
            accelerator="cpu",
            max_epochs=1,
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        fit.fit(Module(trainer, model), torch.utils.data.DataLoader(batches, batch_size=None))
        _check(model, trainer)
        saved = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=False)
        assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == trainer.learning_rate
