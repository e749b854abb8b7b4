"""Recognises folder names that mean good parts, in many languages. Every other folder of test images counts as a type of defect.

Case, separators and accents of a name are ignored. A word also matches in the plural with "s", and together with a word for the
object itself ("good parts", "Gutteile", "OK_Bilder"). docs/use/data.md lists the recognised names.
"""

from __future__ import annotations

import re
import unicodedata

# by language; normalised by `_normalize_name`
GOOD_WORDS = {
    "English": "good ok okay normal nominal pass passed accept accepted acceptable fine clean healthy intact perfect flawless "
    "undamaged undefective nondefective faultless conforming conform golden regular correct nodefect noanomaly "
    "defectfree anomalyfree faultfree damagefree errorfree withoutdefect nondefect gooddata notdefective nonanomalous",
    "German": "gut gutteil gute gutes guter io inordnung fehlerfrei fehlerlos ohnefehler ohnedefekt einwandfrei makellos "
    "unbeschadigt intakt normale gutbild",
    "French": "bon bonne conforme sain saine sansdefaut correcte normale",
    "Spanish": "bueno buena buenas buenos correcto correcta sindefecto sano normale conforme",
    "Italian": "buono buona buoni buone senzadifetti conforme integro sano",
    "Portuguese": "bom boa semdefeito perfeito aprovado",
    "Dutch": "goed goede goedgekeurd zonderdefect foutloos",
    "Polish": "dobry dobra dobre bezwad poprawny",
    "Czech": "dobry dobra dobre bezvad vporadku",
    "Swedish, Danish, Norwegian": "bra god godkand godkendt godkjent felfri",
    "Turkish": "iyi saglam kusursuz hatasiz",
    "Finnish": "hyva ehja virheeton",
    "Chinese": "良品 正常 合格 合格品 好 好品 无缺陷 無缺陷",
    "Japanese": "良品 正常 合格 良 正常品",
    "Korean": "양품 정상 합격",
    "Russian": "хорошие хорошии хорошо годные годныи норма нормальные безбрака бездефектов",
}
# words for the object itself, which may stand before or after the other word
_OBJECT_WORDS_TEXT = """
    part parts piece pieces image images img imgs picture pictures photo photos sample samples item items product products
    test train data class teil teile bild bilder aufnahmen muster imagenes immagini imagens pezzi onderdelen
"""
_BAD = """
    ng nok notok nogood ko nio reject rejected rejection scrap defect defective defekt faulty fault fail failed failure anomaly
    anomalous anomalies anomalie abnormal broken damaged schlecht fehler fehlerhaft ausschuss schlechtteil mauvais mauvaise
    defaut defectueux malo mala defecto defectuoso difettoso difetto scarto defeito ruim slecht 不良 不良品 缺陷 异常 異常 불량
"""
# names that may mean good or defective parts
_UNCLEAR = """
    0 1 class0 class1 negative positive neg pos true false other others misc unknown unlabeled unlabelled unsorted rest new
    normalized todo all images img test data
"""


def _split_words(*texts: str) -> frozenset[str]:
    """Returns all words of the texts, without repeats."""
    return frozenset(word for text in texts for word in text.split())


_good_words, _bad_words, _unclear_words = _split_words(*GOOD_WORDS.values()), _split_words(_BAD), _split_words(_UNCLEAR)
_object_words = _split_words(_OBJECT_WORDS_TEXT)


def means_good_parts(name: str) -> bool:
    """Returns whether the name of a folder or label means good (normal) parts."""
    return _matches_word_list(_normalize_name(name), _good_words)


def means_defective_parts(name: str) -> bool:
    """Returns whether a folder name means defective parts. Used for layouts where unknown names are refused."""
    normalized = _normalize_name(name)
    return normalized.startswith("bad") or _matches_word_list(normalized, _bad_words)


def _matches_word_list(normalized: str, words: frozenset[str]) -> bool:
    """Returns whether a name is in a list of words, also with a plural "s" or with a word for the object, as in "goodparts".

    Args: normalized: the name, from `_normalize_name`.
    """
    candidates = (normalized, *_strip_object_word(normalized))
    return any(word in words or (word.endswith("s") and word[:-1] in words) for word in candidates)


def is_ambiguous_name(name: str) -> bool:
    """Returns whether a folder name may mean good or defective parts, such as "1" or "other"."""
    return _normalize_name(name) in _unclear_words


def _normalize_name(name: str) -> str:
    """Returns the letters and digits of a name, in lower case and without accents."""
    decomposed = unicodedata.normalize("NFKD", name.casefold())
    return "".join(c for c in decomposed if not unicodedata.combining(c) and re.match(r"\w", c) and c != "_")


def _strip_object_word(normalized: str) -> list[str]:
    """Returns the name without a word for the object ("part", "image") at its start or end: one text for each matching word."""
    shortened = [normalized.removeprefix(word) for word in sorted(_object_words) if normalized.startswith(word)]
    return shortened + [normalized.removesuffix(word) for word in sorted(_object_words) if normalized.endswith(word)]
