"""Write the sample: train.csv, val.csv, test.csv and base/ beside this file.

    python tests/sample/make_sample.py

Invented Japanese reviews in two columns, text and label (positive or negative). The label of a
review is that of its conclusion, which depends on negation (美味しくない), on contrast (AだがB: B
counts; A。もっとも、Bのだが: A counts), on scope (Aとは言えない turns A round) and on all of them
together, so that counting words is not enough. Every sentence comes from the templates below, and
the seed is fixed: the script writes the same bytes each time.

base/ is what distill.py trains the sample teacher from: the configuration of a four-layer BERT (no
weights: it starts from random ones) and a tokenizer of the words and characters of train.csv.
"""

import csv
import random
from collections import Counter
from pathlib import Path

from transformers import BertConfig, BertJapaneseTokenizer

HERE = Path(__file__).parent

SIZES = {"train": 5000, "val": 800, "test": 800}
SEED = 20260101
LABELS = {True: "positive", False: "negative"}

# place → what is judged there → words of praise and words of blame for it. Words on い conjugate as
# adjectives; the others take だ and な.
PLACES = {
    "この店": {
        "料理": (["美味しい", "絶品"], ["まずい", "平凡"]),
        "接客": (["丁寧", "良い"], ["雑", "悪い"]),
        "店内": (["きれい", "明るい"], ["汚い", "暗い"]),
        "値段": (["安い", "手頃"], ["高い", "割高"]),
        "席": (["広い", "快適"], ["狭い", "窮屈"]),
        "配膳": (["早い", "正確"], ["遅い", "いい加減"]),
    },
    "この宿": {
        "部屋": (["広い", "きれい"], ["狭い", "汚い"]),
        "朝食": (["美味しい", "豪華"], ["まずい", "貧相"]),
        "立地": (["良い", "便利"], ["悪い", "不便"]),
        "受付": (["親切", "早い"], ["無愛想", "遅い"]),
        "風呂": (["快適", "清潔"], ["窮屈", "不潔"]),
        "眺め": (["素晴らしい", "見事"], ["平凡", "ひどい"]),
    },
    "この製品": {
        "操作": (["簡単", "わかりやすい"], ["面倒", "わかりにくい"]),
        "画面": (["見やすい", "きれい"], ["見づらい", "粗い"]),
        "動作": (["軽い", "安定的"], ["重い", "不安定"]),
        "音": (["静か", "素晴らしい"], ["うるさい", "ひどい"]),
        "作り": (["丈夫", "丁寧"], ["粗末", "雑"]),
        "説明書": (["親切", "わかりやすい"], ["不親切", "わかりにくい"]),
    },
    "この映画": {
        "話": (["面白い", "見事"], ["つまらない", "退屈"]),
        "演技": (["自然", "素晴らしい"], ["不自然", "ひどい"]),
        "展開": (["巧み", "面白い"], ["強引", "つまらない"]),
        "音楽": (["美しい", "見事"], ["うるさい", "平凡"]),
        "映像": (["美しい", "きれい"], ["粗い", "暗い"]),
        "台詞": (["自然", "巧み"], ["不自然", "退屈"]),
    },
}
ADVERBS = ["", "", "とても", "かなり", "本当に", "正直", "思ったより"]
OPENINGS = [
    "",
    "",
    "",
    "週末に行った。",
    "友人に勧められた。",
    "初めて試した。",
    "期待していた。",
    "口コミを見た。",
]
OPENINGS_THING = [
    "",
    "",
    "",
    "先週買った。",
    "友人に勧められた。",
    "初めて試した。",
    "期待していた。",
    "口コミを見た。",
]
KINDS = {
    "plain": 6,
    "and": 4,
    "but": 3,
    "although": 1,
    "yet": 1,
    "afterthought": 1.5,
    "despite": 1,
    "denied": 1,
    "denied but": 0.5,
    "rumour": 1,
    "wish": 1,
}  # how often each form of review comes


class Clause:
    """A judgement such as 料理は美味しくない: what is judged, a word, and whether it is negated."""

    def __init__(self, draw, place, good, but_not=None):
        """`good`: what the clause says in the end.

        `but_not`: a clause whose subject is not to come again.
        """
        subjects = [s for s in PLACES[place] if but_not is None or s != but_not.subject]
        self.subject = draw.choice(subjects)
        self.negated = draw.random() < 0.15
        praise, blame = PLACES[place][self.subject]
        self.word = draw.choice(praise if good != self.negated else blame)
        self.past = draw.random() < 0.4
        self.adverb = draw.choice(ADVERBS) if not self.negated else ""

    @property
    def is_adjective(self):
        return self.word.endswith("い") and self.word not in ("きれい", "いい加減")

    def predicate(self, before_noun=False):
        """The conjugated word; `before_noun` as it stands before ものの, わけ, ので."""
        if self.is_adjective:
            ending = {
                (False, False): "い",
                (False, True): "かった",
                (True, False): "くない",
                (True, True): "くなかった",
            }
            return self.word[:-1] + ending[self.negated, self.past]
        ending = {
            (False, False): "な" if before_noun else "だ",
            (False, True): "だった",
            (True, False): "ではない",
            (True, True): "ではなかった",
        }
        return self.word + ending[self.negated, self.past]

    def plain(self, particle="は"):
        return f"{self.subject}{particle}{self.adverb}{self.predicate()}"

    def attributive(self, particle="が"):
        return f"{self.subject}{particle}{self.adverb}{self.predicate(before_noun=True)}"


def review(draw, place, good):
    """One review of `place` whose conclusion is praise (`good`) or blame, without a final 。"""

    def same(but_not=None):
        return Clause(draw, place, good, but_not)

    def other(but_not=None):
        return Clause(draw, place, not good, but_not)

    kind = draw.choices(list(KINDS), KINDS.values())[0]
    if kind == "plain":
        return same().plain()
    if kind == "and":
        first = same()
        return f"{first.plain('も')}し、{same(first).plain('も')}"
    if kind == "but":  # the second half counts
        first = other()
        return f"{first.plain()}{draw.choice(['が', 'けれど', 'けど'])}、{same(first).plain()}"
    if kind == "although":
        first = other()
        return f"{first.attributive('は')}{draw.choice(['ものの', 'のに'])}、{same(first).plain()}"
    if kind == "yet":
        first = other()
        return f"{first.plain()}。{draw.choice(['しかし', 'だが', 'でも'])}、{same(first).plain()}"
    if kind == "afterthought":  # the first half counts
        first = same()
        start = f"{first.plain()}。{draw.choice(['もっとも', 'まあ'])}、"
        return f"{start}{other(first).attributive('は')}のだが"
    if kind == "despite":  # the half that stands last counts, wherever 差し引いても stands
        first, second = same(), None
        second = other(first)
        despite = f"{second.attributive('が')}のを差し引いても"
        return (
            f"{first.plain()}、{despite}" if draw.random() < 0.5 else f"{despite}、{first.plain()}"
        )
    if kind == "denied":  # とは言えない turns the whole clause round, a negated one too
        return deny(draw, other())
    if kind == "denied but":
        first = same()
        second = other(first)
        return f"{deny(draw, first)}が、{deny(draw, second)}"
    if kind == "rumour":
        if draw.random() < 0.5:
            return f"{same().plain('が')}という評判は{draw.choice(['本当だった', '正しかった'])}"
        return f"{other().plain('が')}という評判は{draw.choice(['嘘だった', '間違いだった'])}"
    missing = other()  # wish: もう少し…なら: what is wished for is not there
    missing.negated, missing.past, missing.adverb = False, False, ""
    missing.word = draw.choice(PLACES[place][missing.subject][0 if not good else 1])
    if good:  # what was feared is not there
        return f"{missing.attributive()}のではと心配したが、そんなことはなかった"
    return f"もう少し{missing.subject}が{conditional(missing)}よかったのに"


def deny(draw, clause):
    """A clause turned round as a whole."""
    clause.adverb = ""
    if draw.random() < 0.5:
        return f"{clause.plain('が')}とは{draw.choice(['言えない', '思わない'])}"
    return f"{clause.attributive()}わけではない"


def conditional(clause):
    return clause.word[:-1] + "ければ" if clause.is_adjective else clause.word + "なら"


def write_base(texts):
    """The configuration and the tokenizer that the sample teacher starts from."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    path = HERE / "base" / "vocab.txt"
    path.parent.mkdir(exist_ok=True)

    def tokenizer(pieces):
        path.write_text("".join(piece + "\n" for piece in pieces), "utf-8")
        return BertJapaneseTokenizer(
            str(path), word_tokenizer_type="mecab", mecab_kwargs={"mecab_dic": "unidic_lite"}
        )

    split = tokenizer(special).word_tokenizer.tokenize
    words = Counter(word for text in texts for word in split(text))
    characters = sorted({character for word in words for character in word})
    often = sorted(word for word, n in words.items() if n > 1 and len(word) > 1)
    pieces = [*special, *characters, *("##" + character for character in characters), *often]
    tokenizer(pieces).save_pretrained(path.parent)
    BertConfig(
        vocab_size=len(pieces),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=512,
    ).save_pretrained(path.parent)


def main():
    draw = random.Random(SEED)
    seen, rows = set(), []
    while len(rows) < sum(SIZES.values()):
        good = len(rows) % 2 == 0
        place = draw.choice(list(PLACES))
        opening = draw.choice(OPENINGS if place in ("この店", "この宿") else OPENINGS_THING)
        named = f"{place}の" if draw.random() < 0.3 else ""
        body = review(draw, place, good)
        text = f"{opening}{named if not body.startswith('もう少し') else ''}{body}。"
        if text not in seen:
            seen.add(text)
            rows.append((text, LABELS[good]))
    draw.shuffle(rows)
    for split, size in SIZES.items():
        part, rows = rows[:size], rows[size:]
        if split == "train":
            write_base([text for text, _ in part])
        with open(HERE / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([("text", "label"), *part])


if __name__ == "__main__":
    main()
