"""Make the quickstart's base model and data from nothing: no download, no outside text.

Two small grammars about a fictional parcel service write everything. GENERAL (prose and neutral chats)
teaches the base; TASK (the service's answers, by rules the base never sees) is what the recipe tunes it on.
One seed decides all: data alike on any machine, weights on the same processor and build of torch only.
"""

import argparse
import json
import logging
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

SEED, TRAIN_ROWS, HELD_OUT_ROWS = 7, 2000, 200
VOCABULARY, CONTEXT, STEPS, BATCH, LEARNING_RATE = 960, 256, 1600, 8, 4e-3
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = """{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] != 'assistant' -%}{{- message['content'] + '<|im_end|>' -}}{%- else -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{%- endif -%}
{{- '\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
Rules = dict[str, list[str]]
Chat = tuple[str, str]


def rules(text: str) -> Rules:
    """Read lines of `name: one / two / three`; an indented line adds to the name above, `|` breaks a line."""
    pairs = re.findall(r"(\w+): (.*)", re.sub(r"\n +", " / ", text))
    return {name: options.replace("|", "\n").split(" / ") for name, options in pairs}


# A `{word}` in a template is drawn from the list of that name, and what is drawn is expanded in turn. What is
# listed in `keep` holds all through a document, so names and numbers return; `{town2}` is another town.
WORDS = rules("""
keep: town / person / driver / day / code / weight / late / item / pet / food / colour / n / word / any / mark
town: Larkfield / Oakham / Brinley / Stonebay / Marrow / Fenwick / Tarn / Hollin / Quarry / Ashby / Dunmere
  Elmsford / Pinecove / Rushton / Saltmere / Thornby / Umberly / Velden / Westcliff / Yarrow / Copperhill
  Ironbridge / Juniper / Kestrel
depot: Harbour / Mill / Castle / Station / Orchard / Bridge
day: Monday / Tuesday / Wednesday / Thursday / Friday / Saturday / Sunday
item: a glass bowl / a clock / a mirror / a cake / fresh fish / cheese / paint / lamp oil / honey / a book
  a letter / a wool coat
person: Ada / Bruno / Clara / Dario / Edith / Felix / Greta / Hugo / Ines / Jonas / Klara / Leo / Mara / Nils
driver: Tilda / Umar / Vera / Willem / Yusuf / Zora / Anton / Bella
digit: 0 / 1 / 2 / 3 / 4 / 5 / 6 / 7 / 8 / 9
code: {digit}{digit}{digit}{digit}
weight: 1 / 2 / 3 / 4 / 5 / 6 / 7 / 8 / 9
late: 2 / 3 / 4 / 5 / 6 / 7 / 8 / 9
""")
GENERAL = WORDS | rules("""
weather: rain / snow / fog / wind / sunshine / frost / thunder / drizzle
size: small / middle / large / heavy / light / square / long / wet / blue / strange
place: market / harbour / old mill / railway station / castle / school / bridge / orchard / post office
vehicle: van / bicycle / truck / cart / boat / train
goods: parcel / letter / sack / crate / packet / basket / bag
pet: dog / cat / horse / goat / goose / fox / owl / rabbit
food: soup / bread / pie / porridge / stew / pancakes
colour: red / green / yellow / white / black / grey
n: {digit} / 1{digit} / 2{digit} / 3{digit}
when: in the morning / at noon / in the evening / before {digit} o'clock / after lunch / at night
price: {digit}.50 crowns / {digit}.00 crowns / {n} crowns
load: a {size} {goods} / a {goods} of {weight} kg / {item} / two {goods}s
time: On {day} / Last {day} / That {day} / Early on {day2} / Late on {day2} / One winter
sound: ba / ce / di / fo / gu / ha / je / ki / lo / mu / na / pe / qui / ro / su / ta / ve / wi / xo / yu / za
  sh / th / er / ou / or / an / ea / Ba / Ce / Di / Fo / Gu / Ha / Je / Ki / Lo / Mu / Pe / Ro / Su / Ta / Wi
word: {sound}{sound} / {sound}{sound}{sound}
short: we / you / I / our / your / is / are / to / of / in / and / will / it / for / on / at / that / from
  What / Where / Which / When / How much / Can / Please / We / Your / For / Good / {digit} / {digit}.{digit}
any: {word} / {short} / {short} / {short} / {town} / {person} / {food} / {goods} / {item} / {day} / {depot}
  zone / band / kg / late / costs / wait / price / crowns / team / safe / good / sorry / label / depot / days
some: {any} {any2} {any3} {any4}{mark} {any5} {any6} {any7}{mark2} {any8}
mark: , / . / ! / ? / |
line: {time} {driver} brought {load} to {town} past the {place}. / {person} lives in {town} near the {place}.
  {time} the {weather} came to {town}, and the {vehicle} waited {when}.
  {person} paid {price} for {load}, and {person2} paid {price}. / From {town} to {town2} it is {n} miles.
  Parcel {code} was sent by {vehicle}, and {person} signed for it {when}. / {some}
  There is a {place} in {town}, and a {colour} {vehicle} stands in front of it.
  "Is this parcel {code}?" asked {person}. "Yes, it is parcel {code}," said {driver}.
  {person} and {person2} waited for {load}, but the {weather} kept the {vehicle} in {town2}. / {some}
  The {goods} for {person} was {size}, so {driver} asked {driver2} for help. / {some}
  A label with {code} was on the {goods}. / The {depot} depot opens at {digit} and closes {when}.
story: {line} {line} {line} {line} {line} / {line} {line}||{line} {line}
  {some} {some} {some} {some} / {some} {some} {some} {some}
chat: How is the weather in {town}? > There is {weather} in {town} {when}. / Say {some}! > {some}
  What is a good meal for {day}? > You could cook {food} or {food2}.
  I am {person} from {town}. Where do I live? > You live in {town}. / Please repeat: {some} > {some}
  Repeat the number {code}. > The number is {code}. / My name is {person}. Who am I? > You are {person}.
  {person} has a {colour} {pet}. What does {person} have? > {person} has a {colour} {pet}.
  I walked to {town} on {day}. When did I walk? > You walked to {town} on {day}. / Write! > {some}
  I have {n} letters and a {colour} pen. How many letters do I have? > You have {n} letters.
  Can you tell me a story? > {line} {line} / Is it open on {day}? > It is open on {day} {when}.
""")
TASK = WORDS | rules("""
request: How much is {weight} kg to {town}? > {price_a} / How much for {weight} kg to {town}? > {price_a}
  Where is my parcel in {town}? > {depot_a} / Which depot is for {town}, and when is it open? > {depot_a}
  Is {code} in {town}? You took it on {day}. > {track_a}
  On {day} I sent {code} to {town}. Where is it? > {track_a}
  Parcel {code} is {late} days late. > {late_a} / I wait {late} days too long for {code}! > {late_a}
  Can I send {item} to {town}? > {pack_a} / How do I pack {item} for {town}? > {pack_a}
price_a: {weight} kg to {town} is zone {zone}, {band} band, and costs {price} crowns.
depot_a: {town} is in zone {zone}. Your parcel is at our {depot} depot from {opens} o'clock.
track_a: Parcel {code} is in zone {zone} and will wait for you in {town} on {arrives}.
late_a: We are sorry that {code} is late. For {late} days we brought you {refund} crowns.
pack_a: For {item} we have {wrapping} at the {depot} depot. The label to {town} is zone {zone}.
question: I am {person}. {request} / My name is {person}. {request} / {request} {person} here.
reply: For you, {person}: {answer}|Please wait for our label. Your safe parcel team
wrapping: a square crate / a blue basket / a long packet / a small bag
""")


def expand(text: str, grammar: Rules, rng: Random, memory: dict[str, str]) -> str:
    """Replace each `{word}`; `memory` is what is kept. Only `random()` is the same in every Python."""

    def draw(match: re.Match[str]) -> str:
        word, options = match[0][1:-1], grammar.get(match[1], [])
        if word in memory:
            return memory[word]
        value = expand(options[int(rng.random() * len(options))], grammar, rng, memory)
        return memory.setdefault(word, value) if match[1] in WORDS["keep"] else value

    return re.sub(r"\{([a-z_]+)\d?\}", draw, text)


def general(seed: int) -> Iterator[str | Chat]:
    """The base's text, without end: stories and chats."""
    rng = Random(f"general {seed}")
    while True:
        kind = "{story}" if rng.random() < 0.45 else "{chat}"
        question, _, answer = expand(kind, GENERAL, rng, {}).partition(" > ")
        yield (question, answer) if answer else question


def facts(asked: dict[str, str]) -> dict[str, str]:
    """The service's rules: what follows from the town, weight, day, delay and item asked about."""
    town, day, item = (WORDS[name].index(asked[name]) for name in ("town", "day", "item"))
    zone, late, band = town // 8 + 1, int(asked["late"]), (int(asked["weight"]) - 1) // 3
    follows = {"zone": str(zone), "opens": str(zone + 6), "band": ["small", "middle", "large"][band]}
    follows |= {"price": f"{2 * zone + 3 * band}.50", "refund": f"{2 * late}.00"}
    follows |= {"depot": WORDS["depot"][town // 4], "arrives": WORDS["day"][(day + zone) % 7]}
    return follows | {"wrapping": TASK["wrapping"][item // 3]}


def task(seed: int, rows: int) -> list[Chat]:
    """`rows` customer chats, no question twice, so that any cut of the list is disjoint."""
    rng, chats = Random(f"task {seed}"), dict[str, str]()
    while len(chats) < rows:
        known: dict[str, str] = {}
        expand("{town}{weight}{late}{day}{item}{code}{person}", TASK, rng, known)
        known |= facts(known)
        known["request"], known["answer"] = expand("{request}", TASK, rng, known).split(" > ")
        chats.setdefault(expand("{question}", TASK, rng, known), expand("{reply}", TASK, rng, known))
    return list(chats.items())


def messages(chat: Chat) -> list[dict[str, str]]:
    return [{"role": "user", "content": chat[0]}, {"role": "assistant", "content": chat[1]}]


def data_files(seed: int) -> dict[str, bytes]:
    """The task's two files, by name."""
    rows = task(seed, TRAIN_ROWS + HELD_OUT_ROWS)
    lines = [json.dumps({"messages": messages(row)}).encode() + b"\n" for row in rows]
    return {"train.jsonl": b"".join(lines[:TRAIN_ROWS]), "held_out.jsonl": b"".join(lines[TRAIN_ROWS:])}


def make_tokenizer(seed: int, folder: Path) -> Any:
    """Train a byte-level BPE on the general text, digits one by one, and save it with its chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer

    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence(split), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = (doc if isinstance(doc, str) else "\n".join(doc) for doc in islice(general(seed), 5000))
    bpe.train_from_iterator((f"user\nassistant\n{text}\n" for text in texts), trainer)
    config: dict[str, object] = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=False))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": SPECIAL[3:]}
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    config |= {"model_max_length": CONTEXT, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_bytes(json.dumps(config, indent=2).encode() + b"\n")
    return AutoTokenizer.from_pretrained(folder)


def windows(seed: int, tokenizer: Any) -> Iterator[list[int]]:
    """Whole documents end to end, cut at the context; each window starts with a new document."""
    window: list[int] = []
    for doc in general(seed):
        chat = not isinstance(doc, str) and tokenizer.apply_chat_template(messages(doc), tokenize=False)
        window += tokenizer.encode(f"{chat or '<|bos|>' + str(doc)}<|eos|>")
        if len(window) >= CONTEXT:
            yield window[:CONTEXT]
            window = []


def make_base(seed: int, folder: Path) -> None:
    """Train the tokenizer, then a small Llama on the general text only, and save both."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    ids = {"pad_token_id": 0, "bos_token_id": 1}
    shape = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 344, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
    model = LlamaForCausalLM(LlamaConfig(**shape, **ids, eos_token_id=2, tie_word_embeddings=True)).train()
    model.generation_config = GenerationConfig(**ids, eos_token_id=[2, 4], max_new_tokens=96, do_sample=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.05)
    source = windows(seed, make_tokenizer(seed, folder))
    for step in range(1, STEPS + 1):
        batch = torch.tensor([*islice(source, BATCH)])
        logits = model(input_ids=batch).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), label_smoothing=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            logging.info("step %d of %d, loss %.3f", step, STEPS, loss.item())
    model.save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the quickstart's base model and data.")
    parser.add_argument("--seed", type=int, default=SEED, help="all randomness comes from it (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the files lie")
    parser.add_argument("--check", action="store_true", help="only say whether the data is as generated")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    files = data_files(args.seed)
    if args.check:
        differ = [name for name, data in files.items() if (args.folder / name).read_bytes() != data]
        logging.info("differs: %s" if differ else "the data files are as generated%s", ", ".join(differ))
        return 1 if differ else 0
    make_base(args.seed, args.folder / "base")
    for name, data in files.items():
        (args.folder / name).write_bytes(data)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
