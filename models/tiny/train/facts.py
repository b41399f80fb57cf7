"""Tables of facts the model is taught: capitals, chemical elements, the calendar."""

from __future__ import annotations

CAPITALS: dict[str, str] = dict(
    pair.strip().split("=")
    for pair in """France=Paris; Germany=Berlin; Spain=Madrid; Italy=Rome; Portugal=Lisbon;
Austria=Vienna; Switzerland=Bern; Belgium=Brussels; the Netherlands=Amsterdam; Denmark=Copenhagen;
Norway=Oslo; Sweden=Stockholm; Finland=Helsinki; Iceland=Reykjavik; Ireland=Dublin;
the United Kingdom=London; Poland=Warsaw; the Czech Republic=Prague; Slovakia=Bratislava;
Hungary=Budapest; Romania=Bucharest; Bulgaria=Sofia; Greece=Athens; Turkey=Ankara; Serbia=Belgrade;
Croatia=Zagreb; Slovenia=Ljubljana; Albania=Tirana; Estonia=Tallinn; Latvia=Riga; Lithuania=Vilnius;
Ukraine=Kyiv; Belarus=Minsk; Russia=Moscow; Georgia=Tbilisi; Armenia=Yerevan; Azerbaijan=Baku;
Cyprus=Nicosia; Malta=Valletta; Japan=Tokyo; China=Beijing; South Korea=Seoul;
North Korea=Pyongyang; Mongolia=Ulaanbaatar; Vietnam=Hanoi; Thailand=Bangkok; Laos=Vientiane;
Cambodia=Phnom Penh; the Philippines=Manila; Malaysia=Kuala Lumpur; Indonesia=Jakarta;
India=New Delhi; Pakistan=Islamabad; Bangladesh=Dhaka; Nepal=Kathmandu; Bhutan=Thimphu;
Afghanistan=Kabul; Iran=Tehran; Iraq=Baghdad; Syria=Damascus; Lebanon=Beirut; Jordan=Amman;
Saudi Arabia=Riyadh; Yemen=Sanaa; Oman=Muscat; Qatar=Doha; Kuwait=Kuwait City; Egypt=Cairo;
Libya=Tripoli; Tunisia=Tunis; Algeria=Algiers; Morocco=Rabat; Sudan=Khartoum; Ethiopia=Addis Ababa;
Kenya=Nairobi; Uganda=Kampala; Rwanda=Kigali; Ghana=Accra; Nigeria=Abuja; Senegal=Dakar;
Mali=Bamako; Angola=Luanda; Zambia=Lusaka; Zimbabwe=Harare; Namibia=Windhoek; Botswana=Gaborone;
Madagascar=Antananarivo; Mozambique=Maputo; Somalia=Mogadishu; Canada=Ottawa;
the United States=Washington; Mexico=Mexico City; Cuba=Havana; Jamaica=Kingston;
Guatemala=Guatemala City; Panama=Panama City; Costa Rica=San Jose; Honduras=Tegucigalpa;
Nicaragua=Managua; Colombia=Bogota; Venezuela=Caracas; Ecuador=Quito; Peru=Lima; Chile=Santiago;
Argentina=Buenos Aires; Uruguay=Montevideo; Paraguay=Asuncion; Brazil=Brasilia;
Australia=Canberra; New Zealand=Wellington; Fiji=Suva""".replace("\n", " ").split(";")
)

_ELEMENTS = """hydrogen H helium He lithium Li beryllium Be boron B carbon C nitrogen N oxygen O
fluorine F neon Ne sodium Na magnesium Mg aluminium Al silicon Si phosphorus P sulfur S chlorine Cl
argon Ar potassium K calcium Ca scandium Sc titanium Ti vanadium V chromium Cr manganese Mn iron Fe
cobalt Co nickel Ni copper Cu zinc Zn gallium Ga germanium Ge arsenic As selenium Se bromine Br
krypton Kr rubidium Rb strontium Sr yttrium Y zirconium Zr niobium Nb molybdenum Mo technetium Tc
ruthenium Ru rhodium Rh palladium Pd silver Ag cadmium Cd indium In tin Sn antimony Sb tellurium Te
iodine I xenon Xe caesium Cs barium Ba lanthanum La cerium Ce praseodymium Pr neodymium Nd
promethium Pm samarium Sm europium Eu gadolinium Gd terbium Tb dysprosium Dy holmium Ho erbium Er
thulium Tm ytterbium Yb lutetium Lu hafnium Hf tantalum Ta tungsten W rhenium Re osmium Os
iridium Ir platinum Pt gold Au mercury Hg thallium Tl lead Pb bismuth Bi polonium Po astatine At
radon Rn francium Fr radium Ra actinium Ac thorium Th protactinium Pa uranium U""".split()

ELEMENTS: list[tuple[str, str]] = list(zip(_ELEMENTS[::2], _ELEMENTS[1::2]))
"""Elements 1 to 92 in order: (name, symbol)."""

MONTHS = """January February March April May June July August September October November
December""".split()
MONTH_DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ORDINALS = """first second third fourth fifth sixth seventh eighth ninth tenth eleventh
twelfth""".split()

COUNTS: list[tuple[str, str, str]] = [
    ("days", "week", "7"), ("months", "year", "12"), ("days", "year", "365"),
    ("days", "leap year", "366"), ("weeks", "year", "52"), ("hours", "day", "24"),
    ("minutes", "hour", "60"), ("seconds", "minute", "60"), ("years", "decade", "10"),
    ("years", "century", "100"), ("years", "millennium", "1000"), ("seasons", "year", "4"),
]
"""How many of the first are in one of the second."""
