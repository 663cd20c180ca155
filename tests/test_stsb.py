"What the lesson cells of 14_data.stsb do not show: the released table, real vectors, damaged files."
import pickle
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch

from hpl_nb import models
from hpl_nb.core import HplError
from hpl_nb.data import stsb as S
from hpl_nb.data.core import Streams, StreamSettings

pytestmark = pytest.mark.filterwarnings("ignore:stsb. sets share pairs") # in the released table, see test_originals
HEADER = "\t".join(S.PAIR_COLUMNS + S.STRONG_COLUMNS)


@pytest.fixture(scope="module")
def folder(shared): return shared/"data/stsb"


@pytest.fixture(scope="module")
def pairs(folder): return S.read_pairs(folder)


@pytest.fixture(scope="module")
def data(folder): return S.stsb(folder, label_ratio=.1)


@pytest.fixture(scope="module")
def glove(shared): return shared/"data/glove/glove6B50d_stsb.npz"


def small_table(path, lines=6, change=lambda rows: rows):
    splits = ["train", "train", "train", "train", "dev", "test"]
    rows = [f"A dog number {i}.\tA cat number {i}.\t{i % 6}.0\t{splits[i % 6]}\tA hound {i} .\tA kitty {i} ."
            for i in range(lines)]
    path.write_text("\n".join(change([HEADER, *rows])) + "\n", encoding="utf-8")
    return path


def wordnet_folder(path):
    path.mkdir()
    lines = {"noun": "00000001 05 n 02 dog 0 domestic_dog 0 000 | x\n00000002 05 n 02 cat 0 true_cat 0 000 | x"}
    for part in ("noun", "verb", "adj", "adv"):
        (path/f"data.{part}").write_text(f"  1 licence\n{lines.get(part, '')}\n")
        (path/f"{part}.exc").write_text("")
    return path


class TestReleasedTable:
    def test_counts(self, pairs):
        assert pairs.split.value_counts().to_dict() == {"train": 5249, "dev": 1000, "test": 1000}
        test = pairs.score[pairs.split == "test"]
        assert abs(test.var(ddof=0) - 2.110) < 5e-4

    @pytest.mark.parametrize("ratio, count", [(.05, 262), (.1, 524), (.2, 1049)])
    def test_labelled_rows_are_the_releases(self, pairs, ratio, count):
        train = np.flatnonzero(pairs.split == "train")
        before = np.random.get_state()
        np.random.seed(0)  # what the release does
        expected = np.random.choice(train.tolist(), int(len(train)*ratio), replace=False)
        np.random.set_state(before)
        assert S.labelled_rows(train, ratio).tolist() == sorted(expected) and len(expected) == count
        assert (np.random.get_state()[1] == before[1]).all()  # the global generator is left alone

    def test_data_set(self, data):
        assert [len(data.rows(split)) for split in ("labelled", "unlabelled", "val", "test")] == [524, 4725, 1000, 1000]
        assert not set(data.labelled) & set(data.unlabelled)
        scores = data.targets[data.labelled]
        assert np.allclose(data.normalizer.normalize(scores), scores/5, atol=1e-6)

    def test_strong_sentences_are_half_as_long_again(self, pairs):
        train = pairs[pairs.split == "train"]
        def length(columns): return np.mean([len(text.split()) for name in columns for text in train[name]])
        assert 1.5 < length(S.STRONG_COLUMNS)/length(S.PAIR_COLUMNS[:2]) < 1.55

    def test_tokens_are_nltks(self, pairs):
        "The stored strong sentences are joined NLTK tokens: ours, less one replaced word, must be among them in order."
        train, disagree = pairs[pairs.split == "train"], 0
        for weak, strong in zip(S.PAIR_COLUMNS[:2], S.STRONG_COLUMNS):
            for sentence, stored in zip(train[weak], train[strong]):
                both = S.tokenize(sentence), stored.split()
                ours, theirs = ([token.replace("``", "''") for token in tokens] for tokens in both)
                disagree += not any(is_subsequence([t for t in ours if t != word], theirs) for word in {"", *ours})
        assert disagree <= .002*2*len(train)

    def test_coverage_of_the_vectors(self, pairs, glove):
        vocabulary = S.build_vocabulary([S.sentence_words(text) for name in S.PAIR_COLUMNS[:2] for text in pairs[name]])
        vectors, found = S.load_vectors(glove, vocabulary.words)
        share = S.coverage(vocabulary, found)
        assert vectors.shape == (len(vocabulary), 50) and share["words"] > .92 and share["tokens"] > .99
        assert .8 < vectors[~found][2:].std() < 1.2 and not vectors[0].any()

    def test_joined_lemmas_are_unknown_unless_split(self, folder, data, glove):
        split = S.stsb(folder, label_ratio=.1, split_underscores=True).inputs.vocabulary
        shares = [S.coverage(v, S.load_vectors(glove, v.words)[1])["tokens"] for v in (data.inputs.vocabulary, split)]
        assert shares[1] > shares[0] + .02
        joined = ["_" in "".join(vocabulary.words) for vocabulary in (data.inputs.vocabulary, split)]
        assert joined == [True, False]

    def test_bilstm_on_real_pairs(self, data, glove):
        vectors, _ = S.load_vectors(glove, data.inputs.vocabulary.words)
        torch.manual_seed(0)
        model = models.bilstm(vectors, hidden=16)
        needs = {"labelled": ["weak"], "unlabelled": ["weak", "strong"], "outer": ["weak"]}
        batch = Streams(data, needs, StreamSettings(), 5, 0)[0]
        assert batch["unlabelled"]["strong"].shape == (32, 2, 40)
        assert not torch.equal(batch["unlabelled"]["strong"], batch["unlabelled"]["weak"])
        optimiser, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
        for _ in range(15):
            loss = (model(batch["labelled"]["weak"]) - batch["labelled"]["y"]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < .5*losses[0]

    def test_views(self, data):
        samples = data.inputs[data.unlabelled[:4]]
        assert torch.equal(data.weak(samples, np.arange(4)), data.plain(samples, None))
        strong = [data.strong(samples, seeds) for seeds in (np.arange(4), np.arange(4, 8))]
        assert torch.equal(*strong)  # stored once (D15)
        words = np.array(data.inputs.vocabulary.words)
        row = int(data.unlabelled[0])
        sentence = S.sentence_words(data.sample_names[row].split(" | ")[0])
        numbers = data.inputs[np.array([row])][0, 0, 0]
        assert words[numbers[numbers != 0]].tolist() == sentence[:40]

    def test_release_layout(self, folder, tmp_path):
        (tmp_path/"glue_data/STS-B").mkdir(parents=True)
        (tmp_path/"glue_data/STS-B/sts.tsv").write_bytes((folder/"sts.tsv").read_bytes())
        assert len(S.read_pairs(tmp_path)) == 7249


def is_subsequence(part, whole):
    rest = iter(whole)
    return all(token in rest for token in part)


class TestBadTables:
    @pytest.mark.parametrize("score", ["", "nan", "five", "-0.1", "5.01", "inf"])
    def test_scores(self, score, tmp_path):
        small_table(tmp_path/"sts.tsv", change=lambda rows: [row.replace("\t2.0\t", f"\t{score}\t") for row in rows])
        with pytest.raises(HplError, match="sts.tsv line 4: score must be a number from 0 to 5.*1 such"):
            S.read_pairs(tmp_path)

    @pytest.mark.parametrize("old, new, message", [
        ("dev", "valid", "line 6: split must be"), ("A cat number 3.", "", "line 5: sentence2 must not be empty"),
        ("sentence1", "first", "no column sentence1"), ("score\tsplit", "score", "sts.tsv")])
    def test_lines(self, old, new, message, tmp_path):
        small_table(tmp_path/"sts.tsv", change=lambda rows: [row.replace(old, new, 1) for row in rows])
        with pytest.raises(HplError, match=message): S.read_pairs(tmp_path)

    def test_too_many_fields(self, tmp_path):
        small_table(tmp_path/"sts.tsv", change=lambda rows: [*rows[:3], rows[3] + "\textra\tmore", *rows[4:]])
        with pytest.raises(HplError, match="sts.tsv cannot be read.*line 4"): S.read_pairs(tmp_path)

    def test_too_few_fields(self, tmp_path):
        small_table(tmp_path/"sts.tsv", change=lambda rows: [*rows, "A half line"])
        with pytest.raises(HplError, match="line 8"): S.read_pairs(tmp_path)

    def test_lines_are_counted_with_blank_ones(self, tmp_path):
        small_table(tmp_path/"sts.tsv", change=lambda rows: [rows[0], "", *rows[1:], ""])
        assert S.read_pairs(tmp_path).index.tolist() == [3, 4, 5, 6, 7, 8]
        small_table(tmp_path/"sts.tsv", change=lambda rows: [rows[0], "", rows[1].replace("\t0.0\t", "\tmany\t"), *rows[2:]])
        with pytest.raises(HplError, match="sts.tsv line 3: score must be"): S.read_pairs(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00rubbish\t\x80", b"\n\n"])
    def test_not_a_table(self, content, tmp_path):
        (tmp_path/"sts.tsv").write_bytes(content)
        with pytest.raises(HplError, match="sts.tsv"): S.read_pairs(tmp_path)

    def test_quotes_are_characters(self, tmp_path):
        small_table(tmp_path/"sts.tsv", change=lambda rows: [row.replace("A dog", '"A dog', 1) for row in rows])
        assert len(S.read_pairs(tmp_path)) == 6

    def test_no_stored_strong_sentences(self, tmp_path):
        small_table(tmp_path/"sts.tsv", change=lambda rows: ["\t".join(row.split("\t")[:4]) for row in rows])
        assert len(S.read_pairs(tmp_path)) == 6
        with pytest.raises(HplError, match="line 2: no strong sentence.*wordnet="): S.stsb(tmp_path, .5)
        data = S.stsb(tmp_path, .5, wordnet=wordnet_folder(tmp_path/"dict"))
        assert data.notes["strong_view"] == "WordNet"

    @pytest.mark.parametrize("ratio", [0, -.1, 1.2, .1, float("nan")])
    def test_label_ratio(self, ratio, tmp_path):
        small_table(tmp_path/"sts.tsv")
        with pytest.raises(HplError, match="label_ratio"): S.stsb(tmp_path, ratio)

    def test_nowhere(self, tmp_path):
        with pytest.raises(HplError, match="download=True"): S.stsb(tmp_path/"nothing")

    def test_download(self, tmp_path, monkeypatch):
        monkeypatch.setattr(S, "fetch", lambda name, root: small_table(root/name))
        assert len(S.read_pairs(tmp_path, download=True)) == 6


class TestVectors:
    words = ("<padding>", "<unknown>", "dog", "cat", "runs")

    def test_formats_agree(self, tmp_path):
        (tmp_path/"v.txt").write_text("dog 1 2 3\nthe 0 0 0\nat name@x.org 5 5 5\ncat -1 .5 2e-1\n", encoding="utf-8")
        with zipfile.ZipFile(tmp_path/"v.zip", "w") as archive: archive.write(tmp_path/"v.txt", "v.txt")
        np.savez(tmp_path/"v.npz", words=np.array(["dog", "the", "cat"]),
                 vectors=np.array([[1, 2, 3], [0, 0, 0], [-1, .5, .2]], dtype=np.float16))
        results = [S.load_vectors(tmp_path/name, self.words, seed=3) for name in ("v.txt", "v.zip", "v.npz")]
        for vectors, found in results:
            assert found.tolist() == [False, False, True, True, False] and vectors.dtype == torch.float32
            torch.testing.assert_close(vectors, results[0][0], rtol=1e-3, atol=1e-3)

    def test_several_files_in_a_zip(self, tmp_path):
        with zipfile.ZipFile(tmp_path/"v.zip", "w") as archive:
            archive.writestr("a.txt", "dog 1 2\n")
            archive.writestr("b.txt", "dog 1 2 3\n")
        with pytest.raises(HplError, match="holds 'a.txt', 'b.txt': pass member="):
            S.load_vectors(tmp_path/"v.zip", self.words)
        assert S.load_vectors(tmp_path/"v.zip", self.words, member="b.txt")[0].shape == (5, 3)

    @pytest.mark.parametrize("text, message", [
        ("dog 1 2 3\ncat 1 2\n", "line 2"), ("dog 1 2 3\ncat 1 x 3\n", r"line 2 \(cat\)"), ("dog\n", "line 1"),
        ("", "none of the 5 words"), ("dog 1 2 nan\n", "'dog' is not finite"), ("chien 1 2 3\n", "none of the 5")])
    def test_broken_text(self, text, message, tmp_path):
        (tmp_path/"v.txt").write_text(text)
        with pytest.raises(HplError, match=f"v.txt.*{message}"): S.load_vectors(tmp_path/"v.txt", self.words)

    @pytest.mark.parametrize("name", ["v.zip", "v.npz"])
    def test_damaged_archives(self, name, tmp_path):
        (tmp_path/name).write_bytes(b"PK\x03\x04 torn")
        with pytest.raises(HplError, match=name): S.load_vectors(tmp_path/name, self.words)

    def test_unusable_npz(self, tmp_path):
        np.savez(tmp_path/"keys.npz", vectors=np.zeros((2, 3)))
        np.savez(tmp_path/"shape.npz", words=np.array(["dog"]), vectors=np.zeros((2, 3)))
        np.savez(tmp_path/"pickle.npz", words=np.array(["dog", "cat"], dtype=object), vectors=np.zeros((2, 3)))
        for name in ("keys", "shape", "pickle"):
            with pytest.raises(HplError, match=f"{name}.npz"): S.load_vectors(tmp_path/f"{name}.npz", self.words)

    def test_no_file(self, tmp_path):
        with pytest.raises(HplError, match="cannot be read"): S.load_vectors(tmp_path/"no.txt", self.words)
        with pytest.raises(HplError, match="no.npz"): S.load_vectors(tmp_path/"no.npz", self.words)
        vectors, found = S.load_vectors(None, self.words, seed=1, dimension=8)
        assert vectors.shape == (5, 8) and not found.any() and not vectors[0].any()
        assert torch.equal(vectors, S.load_vectors(None, self.words, seed=1, dimension=8)[0])
        assert not torch.equal(vectors, S.load_vectors(None, self.words, seed=2, dimension=8)[0])


class TestSynonyms:
    @pytest.fixture()
    def data(self, tmp_path):
        small_table(tmp_path/"sts.tsv", lines=60)
        return S.stsb(tmp_path, .5, wordnet=wordnet_folder(tmp_path/"dict"))

    def test_depends_on_the_seed_of_the_sample_only(self, data):
        rows = data.unlabelled[:8]
        together = data.strong(data.inputs[rows], np.arange(8))
        alone = torch.cat([data.strong(data.inputs[rows[i:i + 1]], np.array([i])) for i in range(8)])
        assert torch.equal(together, alone)
        before = torch.random.get_rng_state()
        data.strong(data.inputs[rows], np.arange(8))
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_every_replacement_and_half_of_the_insertions(self, data):
        "One word of each sentence has a synonym: it is always replaced, and preceded by a synonym half the time."
        rows = np.repeat(data.unlabelled[:1], 400)
        strong = data.strong(data.inputs[rows], np.arange(400))
        index = data.inputs.vocabulary.index
        assert not (strong[:, 0] == index["dog"]).any() and (strong[:, 1] != index["cat"]).all()
        counts = (strong[:, 0] == index["domestic_dog"]).sum(1)
        assert set(counts.tolist()) == {1, 2} and .4 < (counts == 2).float().mean() < .6

    def test_long_sentences_are_cut(self):
        transform = S.SynonymTransform({2: [(3, 4)]})
        sample = torch.full((2, 2, 10), 2)
        assert transform(sample).shape == (2, 10) and (transform(sample) != 2).all()
        assert not S.SynonymTransform({})(torch.zeros(2, 2, 10, dtype=torch.long)).any()

    def test_pickles(self, data):
        "Worker processes that do not fork need it."
        copy = pickle.loads(pickle.dumps(data))
        rows = data.unlabelled[:2]
        assert torch.equal(copy.strong(copy.inputs[rows], rows), data.strong(data.inputs[rows], rows))

    def test_missing_and_broken_files(self, tmp_path):
        folder = wordnet_folder(tmp_path/"dict")
        (folder/"data.verb").write_text("this is no database\n")
        with pytest.raises(HplError, match="data.verb is not a WordNet data file"): S.read_wordnet(folder)
        (folder/"noun.exc").unlink()
        with pytest.raises(HplError, match="lacks noun.exc: fetch"): S.read_wordnet(folder)


def test_vocabulary_limit_and_ties():
    vocabulary = S.build_vocabulary([["b", "a", "c", "c"]], max_words=2, extra=["z", "c"])
    assert vocabulary.words == ("<padding>", "<unknown>", "c", "a", "z")
    assert S.encode(vocabulary, [["b", "z"]], max_tokens=3).tolist() == [[1, 4, 0]]


def test_fitted_normaliser(tmp_path):
    small_table(tmp_path/"sts.tsv", lines=60)
    data = S.stsb(tmp_path, .5, fit_normalizer=True)
    scores = data.normalizer.normalize(data.targets[data.labelled])
    assert abs(scores.mean()) < 1e-5 and .9 < scores.std() < 1.1


def test_settings_load_what_the_loader_gives(tmp_path):
    small_table(tmp_path/"sts.tsv")
    wordnet = wordnet_folder(tmp_path/"wordnet")
    fresh = dict(strong="wordnet", wordnet=str(wordnet), lowercase=False, fit_normalizer=True)
    for settings, by_hand in (({}, S.stsb(tmp_path, .5)), (fresh, S.stsb(tmp_path, .5, wordnet, lowercase=False, fit_normalizer=True))):
        data = S.STSB(str(tmp_path), label_ratio=.5, **settings).load()
        assert torch.equal(data.inputs.numbers, by_hand.inputs.numbers) and data.labelled.tolist() == by_hand.labelled.tolist()
        assert data.normalizer == by_hand.normalizer and data.notes == by_hand.notes
    with pytest.raises(HplError, match="give strong=.wordnet. together"): S.STSB("here", wordnet="there")


def test_vocabulary_does_not_depend_on_labels(tmp_path):
    small_table(tmp_path/"sts.tsv", lines=60)
    assert S.stsb(tmp_path, .2).inputs.vocabulary == S.stsb(tmp_path, .8).inputs.vocabulary


@pytest.mark.parametrize("text, tokens", [
    ("", ""), ("...", "..."), ("I can't, won't, shouldn't've.", "I ca n't , wo n't , should n't 've ."),
    ("'Twas 5:30 p.m.", "'T was 5:30 p.m ."), ("(He said: \"no\")", "( He said : `` no '' )"),
    ("``Yes,'' she said", "`` Yes , '' she said"), ("Rock 'n' roll; 50% & $5!", "Rock 'n ' roll ; 50 % & $ 5 !"),
    ("well-known -- or so", "well-known -- or so"), ("a_b", "a_b")])
def test_tokenize(text, tokens): assert S.tokenize(text) == tokens.split()


def test_every_character_survives():
    "Nothing is lost: tokens joined are the text without spaces, up to the form of quotes."
    frame = pd.DataFrame({"text": ["@T.E.D., an f.e. word… £3m—ok", "x`y ~^|\\+=/ ‚Äės", "a-b--c---d 'e'' f"]})
    for text in frame.text:
        assert "".join(S.tokenize(text)).replace("''", '"') == "".join(text.split()).replace("''", '"')
