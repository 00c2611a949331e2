import lightning as L

import lightning_peft as lp


def cross_validate(module, folds, **options):
    for number, fold in enumerate(folds):
        if number:
            lp.reset(module)
        trainer = L.Trainer(callbacks=[lp.LoRA(r=4)], **options)
        trainer.fit(module, fold)
        yield trainer
