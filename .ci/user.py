"""A user's file, which .ci/wheel type-checks against the installed package."""

import lightning as L

import lightning_peft as lp

trainer = L.Trainer(callbacks=[lp.LoRA(r=8, targets="all-linear", trainable=["classifier"])])
report: lp.Report = lp.inspect(L.LightningModule(), lp.LoHa(r=4))
percent: float = 100 * report.trainable / report.total

# What is wrong is seen to be wrong: with a package of unknown types these comments would be unused, which is an error.
lp.LoRA(r="8")  # type: ignore[arg-type]
lp.LoRa(r=8)  # type: ignore[attr-defined]
