"""What people call the folder of their good parts: every other folder of test images is a kind of defect.

A name is compared without case, separators and accents, alone, with a plural's ending, or beside a word for the thing itself
("good parts", "Gutteile", "OK_Bilder"). docs/use/data.md lists what counts.
"""

from __future__ import annotations

import re
import unicodedata

# by language; each as `_bare` leaves it
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
# the thing itself, which may stand before or after
_THINGS = """
    part parts piece pieces image images img imgs picture pictures photo photos sample samples item items product products
    test train data class teil teile bild bilder aufnahmen muster imagenes immagini imagens pezzi onderdelen
"""
_BAD = """
    ng nok notok nogood ko nio reject rejected rejection scrap defect defective defekt faulty fault fail failed failure anomaly
    anomalous anomalies anomalie abnormal broken damaged schlecht fehler fehlerhaft ausschuss schlechtteil mauvais mauvaise
    defaut defectueux malo mala defecto defectuoso difettoso difetto scarto defeito ruim slecht 不良 不良品 缺陷 异常 異常 불량
"""
# names of which nobody can say what they mean
_UNCLEAR = """
    0 1 class0 class1 negative positive neg pos true false other others misc unknown unlabeled unlabelled unsorted rest new
    normalized todo all images img test data
"""


def _words(*texts: str) -> frozenset[str]:
    return frozenset(word for text in texts for word in text.split())


_good, _bad, _unclear, _things = _words(*GOOD_WORDS.values()), _words(_BAD), _words(_UNCLEAR), _words(_THINGS)


def is_good_name(name: str) -> bool:
    """Whether a folder or label of this name holds good parts."""
    bare = _bare(name)
    return any(word in _good or (word.endswith("s") and word[:-1] in _good) for word in (bare, *_without_thing(bare)))


def is_bad_name(name: str) -> bool:
    """Whether a folder beside one of good parts, where any other name is refused, holds defective ones."""
    bare = _bare(name)
    return bare.startswith("bad") or any(
        word in _bad or (word.endswith("s") and word[:-1] in _bad) for word in (bare, *_without_thing(bare))
    )


def is_unclear_name(name: str) -> bool:
    """Whether nobody can say if a folder of this name holds good parts."""
    return _bare(name) in _unclear


def _bare(name: str) -> str:
    """Lower case, without accents and anything that is no letter or digit."""
    plain = unicodedata.normalize("NFKD", name.casefold())
    return "".join(c for c in plain if not unicodedata.combining(c) and re.match(r"\w", c) and c != "_")


def _without_thing(bare: str) -> list[str]:
    found = [bare.removeprefix(thing) for thing in sorted(_things) if bare.startswith(thing)]
    return found + [bare.removesuffix(thing) for thing in sorted(_things) if bare.endswith(thing)]
