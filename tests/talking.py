"""The tiny model taught a few dialogues, so that it answers in words and ends its answers."""

from pathlib import Path

import torch

from accessory.data.collate import collate
from accessory.data.examples import Recipe
from accessory.model.meta import MetaModel
from accessory.text.chat import Message
from accessory.text.forms import DefaultForm
from accessory.train.export import export_checkpoint
from accessory.train.optim import adamw
from accessory.train.schedule import Schedule
from accessory.train.trainer import train_step

COUNT = "Please count."
DIALOGUES = (
    (
        ("What is a list?", "A list is a sequence of values that can change."),
        ("And a tuple?", "A tuple is a sequence of values that stays as it is."),
    ),
    ((COUNT, ", ".join(map(str, range(1, 41))) + "."),),
)
_STEPS = 60


def teach(base: Path, folder: Path) -> Path:
    """Train the model of ``base`` on DIALOGUES until it knows them, and write it to ``folder``."""
    model = MetaModel.from_pretrained(base, dtype="fp32", device="cpu", max_seq_len=512)
    form, recipe = DefaultForm(model.tokenizer), Recipe(model.tokenizer, 512)
    chats = [
        [message for question, answer in turns for message in (Message("user", question), Message("assistant", answer))]
        for turns in DIALOGUES
    ]
    rows = [recipe.encode(part)[:2] for chat in chats for part in form.parts(chat)]
    batch = collate([[row] for row in rows])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as quick as two, and much quicker where the cores are busy
    model.train()
    optimizer = adamw(model.named_parameters(), lr=0.0, weight_decay=0.0)
    schedule = Schedule(steps=_STEPS, lr=3e-3, min_lr=1e-4, warmup=5)
    for step in range(_STEPS):
        result = train_step(model, optimizer, [batch], lr=schedule(step), clip_grad=1.0)
        if result.loss < 0.003:
            break
    torch.set_num_threads(threads)
    assert result.loss < 0.1, f"it has not learned its dialogues: loss {result.loss}"
    return export_checkpoint(model, folder, dtype=torch.float32, form=form)
