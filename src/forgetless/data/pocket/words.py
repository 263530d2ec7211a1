"""The words that the pocket skills and the pretraining text draw from."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Ada Amy Ana Ben Bob Dan Eva Finn Gus Hal Ida Ivy Jack Kim Leo Lily Max Mia Nina Noah Olga Pia "
    "Rosa Sam Tom Uma Zoe"
)
OBJECTS = _words(
    "apples balls beads books buttons cakes cards coins cups eggs flags keys kites leaves lemons "
    "marbles nuts pears pencils pens plums rings rocks shells stamps stars stickers toys"
)
CONTAINERS = _words("bags baskets boxes bowls jars packs rows shelves")
VERBS = _words("brings buys draws fills finds gives has likes loses pays sells shares takes wants")
COLOURS = _words("black blue brown green grey orange pink purple red white yellow")
WORDS = _words(
    "Q A How many does do did is are was there they them it in all on of for to and then with each "
    "every come among by more than less as times time fairly together now left back get gets has "
    "have friend friends dollar dollars few some answer The the a an There Each They It In If This "
    "write Write function Function that takes returns return given list lists number numbers word "
    "words string strings letter letters text item items value values result sum total product "
    "difference average mean count length largest smallest longest shortest first last second "
    "third next even odd positive negative sort sorted Sort reverse reversed Reverse order "
    "alphabetical backwards forwards double half square twice remove add Add keep without only "
    "not no yes or equal greater smaller between two three four five six ten zero one upper lower "
    "case vowels spaces whether which Which what What who Who where Where when why true false "
    "cat dog bird fish horse cow sheep mouse frog lion tiger bear wolf fox rabbit duck house tree "
    "river road stone cloud rain snow wind sun moon sea hill lake field garden table chair door "
    "window lamp bread milk cheese soup rice salt sugar honey water tea coffee city main used "
    "belong stands periodic"
)
ANIMALS = _words("cat dog bird fish horse cow sheep mouse frog lion bear wolf fox rabbit duck")
VARIABLES = _words("a b c i j k m n s t x y items numbers text total value values word words")
FUNCTIONS = _words(
    "add average check combine count double find first is_even join largest last length "
    "repeat reverse second shorten smallest sort square swap total"
)
CALLS = _words("abs int len list max min print range reversed set sorted str sum")
METHODS = _words("append count endswith index join lower pop replace split startswith strip upper")
