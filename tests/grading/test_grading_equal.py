"""What the math grader takes for equal, and what not.

The tables are policies; test_grading_numbers.py has whole families of numbers.
"""

import pytest

from trd_jax.grading.math import verifier as grading

MATCHES = r"""
1/2004! == \frac{1}{2004!}
2^{-99} == \frac{1}{2^{99}}
\frac{7}{2} == 3\frac{1}{2}
\frac{7}{2} == 3.5
\frac{1}{2} == \frac{2}{4}
073 == 73
1234567 == 1\,234\,567
1234567 == 1,234,567
10,\!080 == 10080
1000 == 1 000
100 == 100 dollars
100 == \$100
C == \text{(C) }\frac{1}{2}
C == \textbf{(C)}
\text{even} == Even
42 == \text{The answer is }42
\sqrt{3} == √3
123 == １２３
\sqrt{2+\sqrt{3}} == \frac{\sqrt{6}+\sqrt{2}}{2}
e^{i\pi/3} == \frac12+\frac{\sqrt3}2 i
[0,1) == 0\le x<1
(0,1) == ]0,1[
(-\infty,-1)\cup(1,\infty) == |x|>1
(2,\infty) == x > 2
x \in [-2,7] == -2 \le x \le 7
90^\circ == 90
90^\circ == 90 degrees
28\% == 28
15\mbox{ cm}^2 == 15\text{ square cm}
12 == 12\,\mathrm{km/h}
\{1,2,3\} == 3,2,1
\{1,2,3\} == S = \{3,1,2\}
\{(1,2)\} == (1,2)
\{5\} == (5)
1,2,3 == (1,2,3)
(1,2,3) == 1,2,3
1,2 == 2 and 1
1 \pm \sqrt{19} == 1-\sqrt{19}, 1+\sqrt{19}
x=5 == 5
5 == x = 5
4 == 2+2 = 4
y = 2x+3 == 2x - y + 3 = 0
x^2+y^2=4 == 4y^2 = 16 - 4x^2
x < 1 == -x > -1
x+y < 1 == -x-y > -1
2k == k+k
\frac{n(n+1)}{2} == \binom{n+1}{2}
\frac{1}{3} == 0.333333
42.43 == 42.4264
42.43 == 30\sqrt{2}
0.0000672 == 6.72\times 10^{-5}
\begin{pmatrix}1\\2\end{pmatrix} == \begin{bmatrix} 1 \\ 2 \end{bmatrix}
\begin{pmatrix}1\\2\end{pmatrix} == (1,2)
2:3 == \frac23
8\binom{50}{19} == \binom{50}{31}\cdot 8
6 == 3(2)
2^{2026}-1 == 2\cdot 2^{2025} - 1
\left(3,\frac{\pi}{2}\right) == (r,\theta)=(3,\pi/2)
\frac{\sqrt{2}}{2} == \sin 45^\circ
\log_2 8 == 3
52_8 == 52_{8}
\frac{2}{3} == \frac{2}{3} \approx 0.667
55 == \sum_{k=1}^{10} k
\emptyset == \varnothing
\emptyset == \{\}
\mathbb{R}\setminus\{3\} == x \ne 3
(-\infty,1)\cup(1,3)\cup(3,\infty) == \mathbb{R}\setminus\{3,1\}
[0,1] == \{x \in \mathbb{R} : 0 \le x \le 1\}
x \le -1 \lor x \ge 1 == (-\infty,-1]\cup[1,\infty)
x=1, x=2 == x \in \{1,2\}
12 == twelve
21 == \text{twenty-one}
\frac{1}{3} == 0.\overline{3}
\frac{1}{6} == 0.1\overline{6}
1500000 == 1.5e6
{10 \choose 3} == 120
\frac{\pi}{4} == 45^\circ
60^\circ == \frac{\pi}{3}
5\text{ m/s} == 5 m/s
12 == \text{12 apples}
£12 == 12
17 == 17 \pmod{20}
x \equiv 3 \pmod 7 == 3 (mod 7)
101_2 == 101_{\text{two}}
101_2 == 101 (base 2)
13,14,18 == \begin{pmatrix} 13 \\ 14 \\ 18 \end{pmatrix}
13,14,18 == \begin{pmatrix} a \\ 13 \\ b \\ 14 \\ c \\ 18 \end{pmatrix}
(1,2,3) == \langle 1,2,3\rangle
(1,2,3) == \begin{pmatrix}1\\2\\3\end{pmatrix}
(13,14,18) == a=13, b=14, c=18
(a,b) = (1,2) == b=2, a=1
2,3,5 == [2,3,5]
5 == **5**
3.14 == \approx 3.14
\triangle ABC == ABC
5\text{ cm}^2 == 5\text{ cm²}
5\text{ square cm} == 5\text{ cm squared}
5\text{ m/s} == 5\text{ meters per second}
9.8\text{ m/s}^2 == 9.8 m/s^2
60\text{ mph} == 60\text{ miles per hour}
25 == 25 m/s
30\text{ degrees Celsius} == 30^\circ\text{C}
5\text{ apples} == 5\text{ red apples}
5\text{ ways} == 5\text{ (way)}
8 == 8 apples
8 apples == 8
5 == 5\text{ is the answer}
10 == \text{about }10
\text{Alice: }5,\text{ Bob: }7 == \text{Bob: }7,\text{ Alice: }5
\text{Alice: }5,\text{ Bob: }7 == 5,7
2\frac{dy}{dx} == \frac{dy}{dx}\cdot 2
\vec{a}\cdot\vec{b} == \vec{b}\cdot\vec{a}
f^{-1}(2)+1 == 1+f^{-1}(2)
\lfloor\frac{n}{3}\rfloor+1 == 1+\lfloor n/3\rfloor
\lceil\log_2 n\rceil == \lceil\frac{\ln n}{\ln 2}\rceil
\lfloor\frac{n+3}{3}\rfloor == \lfloor\frac n3\rfloor+1
\$5 == \text{\$}5
5\text{ euros} == 5\,€
AB:CD=1:2 == BA:DC=1:2
\sin x=\frac12 == \sin(x)=0.5
\log x=5 == \log_{10} x=5
\overline{AB}=2 == \overline{BA}=2
P(X)=X^2 == P(x)=x^2
\{\{1,2\},\{1,2\}\} == \{\{2,1\}\}
5\text{ million} == 5,000,000
1.25\text{ million} == 1250000
\$5 million == 5000000
12000 == \text{12 thousand people}
500000 == 5 hundred thousand
3\text{ dozen eggs} == 36
\ln(ab) == \ln a+\ln b
\sqrt{ab} == \sqrt a\sqrt b
2\ln x == \ln x^2
\log_2(xy) == \log_2 x+\log_2 y
n\sqrt n == \sqrt{n^3}
\frac{\sqrt{x}}{x} == \frac{1}{\sqrt x}
e^{\ln x} == x
\ln\frac{x}{y} == \ln x - \ln y
|ab| == |a||b|
\sqrt{x^2} == |x|
2\ln|x| == \ln x^2
\sqrt[3]{x^3} == x
\sqrt[3]{-x} == -\sqrt[3]{x}
-2 == \sqrt[3]{-8}
\sum_{k=1}^{2} f(k) == f(1)+f(2)
\mathbb{R} == (-\infty,\infty)
(-\infty,\infty) == \mathbb{R}
(-\infty,\infty) == \text{all real numbers}
\text{all real numbers} == x \in \mathbb R
\mathbb{R} == \text{All reals}
\mathbb{R}^+ == (0,\infty)
(0,\infty) == \text{all positive real numbers}
[0,\infty) == \mathbb{R}_{\geq 0}
(-\infty,0) == \mathbb{R}^-
2:30 == 2:30
2:05\text{ PM} == 2:05
1:2 == 5:10
7:15 == 7{:}15
7/3 == 2 1/3
-2\frac13 == -2 1/3
1.5 == 1 1/2
\frac{x}{2} == f^{-1}(x)=x/2
f^{-1}(x)=x/2 == \frac{x}{2}
\begin{pmatrix}1\\2\end{pmatrix} == A^{-1} = \begin{pmatrix}1\\2\end{pmatrix}
A,C == \text{A, C}
A,C == \text{(C) and (A)}
C == (C)\ 5
C == \text{The answer is C}
C == \text{Option (C)}
2A == \text{2A}
25\% == \text{25\%}
\frac13 == 0.333...
\frac16 == 0.1666\ldots
\frac{4}{33} == 0.121212…
\ln 2 == \log_e 2
\log_{10}2 == \lg 2
30^\circ == \frac{\pi}{6}\text{ rad}
\emptyset == \text{no solution}
\text{no solution} == \text{No solutions}
1,000,000 == one million
5 == 5\text{ real roots}
5 == \text{The least root is }5
10 == \text{a total of }10
0.\overline{12} == 0.121212...
\tan^{-1}(1) == \frac{\pi}{4}
\cos^2 x - \sin^2 x == \cos(2x)
\log_4 8 == \frac32
\{-1,1\} == \pm 1
2,-2 == x=2\text{ or }x=-2
(1,2),(3,4) == \{(3,4),(1,2)\}
(-\infty,3] == 3 \ge x
2x+3y=6 == 4x+6y=12
\frac{n!}{(n-2)!} == n(n-1)
\frac{x^3}{3}+C == \frac{1}{3}x^3+C
5\sqrt{2}\text{ cm} == 5\sqrt{2}
\sqrt{-4} == 2i
\lfloor x+1\rfloor == \lfloor x\rfloor+1
-37_8 == -37_{8}
201_{(5)} == 201_5
a_{1337}=4011 == 4011
x_1=2,x_2=3 == x_1=3,x_2=2
(0,1) == 0<y<1
2f'(x) == f'(x)+f'(x)
15' == 15
16'' == 16
719 == \textbf{(719) }
81 == \mathbf{(081)}
204 == {\bf 204}
204 == {\rm 204}
204 == \textcolor{red}{204}
204 == \color{blue}204
204 == \color{blue}{204}
204 == {\color{red} 204}
204 == \Large 204
204 == \texttt{204}
204 == \underline{204}
204 == \colorbox{yellow}{204}
204 == \fcolorbox{red}{white}{$204$}
204 == \textbf{\textit{204}}
204 == \bbox[5px, border: 1px solid]{204}
204 == 204\ \square
204 == 204 ∎
204 == 204 \quad \checkmark
204 == 204 \tag{3}
204 == \hspace{1em}204
\frac12 == \boldsymbol{\frac{1}{2}}
\frac12 == \mathbf{\frac12}
\frac12 == \text{$\frac12$}
11\sqrt2 == \text{11\sqrt{2}}
x^2+1 == \boldsymbol{x^2+1}
2^{10} == 2^\mathbf{10}
5\text{ cm} == 5\,{\rm cm}
5\text{ cm} == 5\;\texttt{cm}
\text{north} == \textsf{North}
2e-1 == 2e - 1
2e-1 == -1+2e
24e - 32 == 24e-32
0.005 == 5e-3
5\times10^{-3} == 5e-3
6\times 10^{23} == 6e23
1.5\times 10^{-7} == 1.5e-7
204 == m+n=204
204 == a+b+c=204
204 == \alpha + \beta = 204
204 == AB^2 = 204
204 == x^2+y^2 = 200+4 = 204
2k == m+n = 2k
\frac12 == x+y=\frac12
4 == 2+2=4
e^{-1} == exp(-1)
\frac{1}{e} == \exp(-1)
e^{-x} == exp(-x)
\arctan 2 == atan(2)
\arctan 2 == arctan(2)
\frac{\pi}{4} == atan(1)
4\sqrt2 == 4\sqrt(2)
4\sqrt2 == 4*sqrt(2)
\sqrt{2+\sqrt3} == sqrt(2+sqrt(3))
\sqrt{2+\sqrt3} == \sqrt(2+\sqrt(3))
\binom{10}{3} == binomial(10, 3)
120 == comb(10, 3)
24 == factorial(4)
3 == abs(-3)
3 == log2(8)
x^{3} == pow(x, 3)
3:30 PM == 3:30 \text{ PM}
3:30 PM == 3:30 \text{ p.m.}
9:45 a.m. == 9:45\text{ AM}
3:30 PM == 3:30pm
3:30 PM == 03:30 PM
3:30 PM == 3:30
3:30 PM == 15:30
5:05(PM) == 5:05 \text{ PM}
p - q == p-q
p - q == -q+p
AB == A \cdot B
Yes == yes
\text{YES} == Yes
Paul == \text{paul}
Odd == odd
x-axis == \text{x-axis}
\{1,2\} == \{2,1,1\}
\{1,1,2\} == \{1,2\}
\{\frac12,1\} == \{1,0.5,\frac12\}
2,3 == 2\\3
2,3 == 2 \\ 3 \\
2,3 == x=2 \\ x=3
2,3 == \begin{aligned}x&=2\\x&=3\end{aligned}
p=5,q=2;p=7,q=2 == (5,2),(7,2)
p=5,q=2;p=7,q=2 == (7,2),(5,2)
p=5,q=2;p=7,q=2 == p=7,q=2 \text{ or } p=5,q=2
p=5,q=2;p=7,q=2 == q=2,p=5;q=2,p=7
(5,2),(7,2) == p=5,q=2;p=7,q=2
(5,2),(7,2) == (p,q)=(5,2),(7,2)
42 == 42 \text{ square}
42 == 42\text{ square units}
5\text{ centimeters} == 5 \text{ centimetrs}
7\text{ bananas} == 7\text{ banannas}
18+\frac{3}{2}\pi == \textbf{18+\frac{3}{2}\pi}
12_{10} == 12_{10}
12 == \hskip 1em 12
12 == \mkern 3mu 12
12 == \mathop{12}
12 == \enclose{circle}{12}
e^{2} == \mathbf{e^{2}}
2e-1 == \boldsymbol{2e-1}
n! == \mathbf{n!}
x>2 == \boldsymbol{x>2}
\sin x == \mathbf{\sin x}
mn-1 == \mathbf{mn-1}
30^\circ == {30^\circ}
5\text{ cm} == \mathbf{5\text{ cm}}
\text{even} == {\bf \text{even}}
\triangle ABC == \textbf{$\triangle ABC$}
\begin{pmatrix}1\\2\end{pmatrix} == \bm{\begin{pmatrix}1\\2\end{pmatrix}}
\frac34 == \nicefrac{3}{4}
3:30 PM == \text{3:30 p.m.}
3:00 PM == 3 pm
\text{noon} == 12:00 PM
\ln 2 == log_e(2)
6 == gcd(12, 18)
36 == \text{lcm}(12,18)
3 == \max\{1,3\}
10 == {}_5C_2
\text{circle} == \text{a circle}
60 == 60\frac{\text{km}}{\text{h}}
\$5 == 5\text{ dollars}
£5 == 5 pounds
\frac13 == 0.(3)
1234567 == 1'234'567
1234567 == 1_234_567
1234567 == 1.234.567
\mathbb{R} == ℝ
x\le 5 == x ⩽ 5
30^\circ == 30º
\frac12 == 1⁄2
3:4:5 == 6:8:10
x_1+x_2 == x2+x1
n2^{n-1} == n\cdot 2^{n-1}
(x,y)=(1,2) == (y,x)=(2,1)
(a,b)=(1,2),(3,4) == (b,a)=(2,1),(4,3)
\frac{NO}{BO}=\frac{1}{2} == \frac{1}{2}
12 == `12`
12 == "12"
12 == \underbrace{12}
12 == \rule{0pt}{2ex}12
12 == \cancel{11}\,12
35 == C(7,3)
f(t)=t^2 == f(x)=x^2
8\text{ m/s} == 8\text{ m}/\text{s}
r=3,s=8 == (s,r)=(8,3)
2\pi r h == 2\pi hr
\frac79 == P = \frac{7}{9} \approx 0.778
1+1=<<1+1=2>>2 #### 2 == 2
(1,3) == x>1 \text{ and } x<3
(1,3) == x<3, x>1
1<x<3 == x<3\text{ and }x>1
(1,2)\cup(2,\infty) == x>1,\ x\neq 2
(1,3)\cup(3,5) == 1<x<5 \text{ and } x\ne 3
(0,\sqrt2)\cup(\sqrt2,5) == 0<x<5, x\ne\sqrt2
\mathbb{R}\setminus\{0,1\} == x\neq 0, 1
\mathbb{R}\setminus\{0,1\} == x\neq 1 \text{ and } x\neq 0
\mathbb{R}\setminus\{0\} == x\in\mathbb{R}, x\neq 0
(0,1)\cup(1,\infty) == (0,\infty)\setminus\{1\}
(-\infty,3]\cup[5,\infty) == \mathbb{R}\setminus(3,5)
(-\infty,3)\cup(5,\infty) == x \notin [3,5]
(-\infty,3)\cup(5,\infty) == x<3 \text{ or } x>5
(-\infty,3)\cup(5,\infty) == x<3 \lor x>5
(-\infty,-1)\cup(4,\infty) == (-\infty,-1)\text{ and }(4,\infty)
(1,2)\cup(3,4)\cup(9,\infty) == 1<x<2, 3<x<4, \text{ and } x>9
x<-1 \text{ and } x>4 == (-\infty,-1)\cup(4,\infty)
n\ge 3, n=1 == n=1, n\ge 3
x<3\text{ or }x=5 == (-\infty,3)\cup\{5\}
(-\infty,3) == \mathbb{R}\setminus[3,\infty)
\begin{pmatrix}2\\0\\-1\end{pmatrix} == (2,0,-1)^T
\begin{pmatrix}2\\0\\-1\end{pmatrix} == \begin{pmatrix}2&0&-1\end{pmatrix}^T
\gcd(m,n)-1 == -1+\gcd(n,m)
|S|=5 == 5
x=y == y=x
a>b == b<a
x>a == (a,\infty)
x\in(1,2) == 1<x<2
36 == 36\%
\text{2 hours 30 minutes} == 2 \text{ hours } 30 \text{ minutes}
56\% == \frac{56}{100} = 56\%
(1+1)\cdot 2=4 == 4
P_1(x)=x-2 == P_1(t)=t-2
f(x)=x-1, f(x)=1-x == f(t)=1-t\text{ or }f(t)=t-1
a_n=2^{n-1} == a_k=2^{k-1}
T(n)=n^2 == T_n=n^2
\angle A=60^\circ == A=60^\circ
\angle ABC=60^\circ == \angle CBA=60^\circ
y=2x+1 == x=\frac{y-1}{2}
f(x)=ax == f(t)=at
1,250\sqrt{2} == 1250\sqrt2
0,100\pi == 100\pi, 0
x \ge 0 \text{ and } y \le 2 == y\le 2, x\ge 0
\begin{pmatrix}2\\-1\end{pmatrix} == \begin{bmatrix}2\\[2pt]-1\end{bmatrix}
\$1,250 == \$1250
\$1,250 == 1250\text{ dollars}
1250\text{ cm} == 1,250\text{ cm}
7\text{:}05\text{ AM} == 7:05 \text{ a.m.}
1+\sqrt3 i == 2\operatorname{cis}60^\circ
1+\sqrt3 i == 2\operatorname{cis}\left(\frac{\pi}{3}\right)
2,3 == 2\text{ или }3
2,3 == 2\text{ y }3
2,3 == x=2或x=3
2,3 == 2、3
17 == \textbf{(D) }17
17 == (D) 17
17 == \text{D. }17
-5 == \textbf{(A)}\ -5
\textbf{(D) }17 == D
\textbf{(D) }17 == 17
(2,-3) == P(2,-3)
A(1,2) == (1,2)
A(1,2), B(3,4) == B=(3,4), A=(1,2)
3\mathbf{i}-2\mathbf{j}+\mathbf{k} == 3\hat{i}-2\hat{j}+\hat{k}
\langle 3,-2,1\rangle == 3\hat{\imath}-2\hat{\jmath}+\hat{k}
\begin{pmatrix}3\\-2\end{pmatrix} == 3\vec i-2\vec j
\frac{\pi}{4}+k\pi, k\in\mathbb{Z} == k\pi+\frac{\pi}{4}\ (k\in\mathbb{Z})
2k\pi, k\in\mathbb{Z} == 2n\pi\text{ for any integer }n
2k\pi, k\in\mathbb{Z} == 2n\pi\text{, where }n\text{ is an integer}
36^\circ30' == 36.5^\circ
36^\circ30' == 36°30′
120 == C_{10}^{3}
120 == \mathrm{C}^3_{10}
\overrightarrow{QP} == -\overrightarrow{PQ}
\overrightarrow{PQ}+\vec{QR} == \vec{QR}+\overrightarrow{PQ}
\overline{PQ}\cdot\overline{RS} == \overline{SR}\cdot PQ
\angle KLM == \angle MLK
\triangle KLM == \triangle LMK
\overline{KL} == LK
E[Y]^2 == (E[Y])^2
\mathbb{E}[Y^2]-\mathbb{E}[Y]^2 == -E[Y]^2+E[Y^2]
f(x+1)+f(2x) == f(2x)+f(1+x)
h(a+b) == ha+hb
P(A|B) == P(A \mid B)
|w|^2 == w\bar{w}
|x|^2 == x^2
\operatorname{Re}(z) == \frac{z+\overline{z}}{2}
r \vee s == s \lor r
r \to s == \neg r \lor s
A\cap(B\cup C) == (A\cap B)\cup(A\cap C)
A\setminus B == A\cap B^c
\text{total area}=7 == \text{Area}=7
1011_2 == 1011\text{ in binary}
1011_2 == 0b1011
1F_{16} == 1f_{16}
\$250 == \text{USD }250
\$250 == US\$250
250\text{ rupees} == \text{Rs. }250
250 == Rs. 250
70 == \frac{8!}{4!4!}
2:7 == 2\text{ to }7
\text{no solution} == \text{There is no real solution}
\text{No} == \text{No, it does not converge}
1871 == \text{the year 1871}
7\text{ inches} == 7\text{ in.}
(-\infty,2)\cup(5,9) == (-\infty,2)\bigcup(5,9)
|x-4|<3 == 1<x<7
|2x+1|\ge 5 == (-\infty,-3]\cup[2,\infty)
|7-x|\le 2 == [5,9]
\mathbb{R}\setminus\{-3,3\} == x\neq\pm 3
\begin{vmatrix} p & q \\ r & s \end{vmatrix} == ps-qr
x^4+C == x^4+K
\text{Ann and Joe} == \text{Joe and Ann}
\text{red, blue and green} == \text{blue, green, and red}
B, D == BD
BDE == \text{E, B, D}
\text{does not exist} == DNE
\text{does not exist} == \text{The limit does not exist}
\text{diverges} == \text{The series is divergent}
2\text{ cm or }7\text{ cm} == 7\text{ cm}, 2\text{ cm}
10 == \sum_{n=1}^{4} n=10
1\text{ hour }20\text{ minutes} == 1\text{ hr and }20\text{ min}
1\text{ hour }20\text{ minutes} == 80\text{ minutes}
6\text{ feet }2\text{ inches} == 6' 2''
\begin{cases}t&t>1\\2&t<1\end{cases} == f=\begin{cases}2&t<1\\t&t>1\end{cases}
\begin{cases}t&t>1\\2&t<1\end{cases} == \begin{cases}2,&t<1\\t,&t>1\end{cases}
\begin{cases}1&t=0\\0&t>0\end{cases} == \begin{cases}0&t>0\\1&t=0\end{cases}
\begin{cases}x=4\\y=9\end{cases} == (4,9)
12\text{ newtons} == 12\text{ N}
12\ \Omega == 12\text{ ohms}
30\text{ C} == 30\text{ coulombs}
17\text{th} == 17^{\text{th}}
\text{\$6.50 per kilo} == \$6.50
\{3!,3!\} == \{6\}
e^{e^{10}} == e^{e^{4+6}}
"""
MISMATCHES = r"""
\frac{1}{2004!} == \frac{1}{2006!}
2^{-99} == 2^{-98}
2^{2026}-1 == 2^{2026}
2^{2026}+\sqrt2 == 2^{2026}
1,2,\ldots,n == 1,3,\ldots,2n-1
6 == 6 or 7
6 == 6, 7
6 == \pm 6
0.5 == 50\%
28\% == 0.28
3.14 == \pi
0.15 == 0.1523
16386.17 == 16386.16
\frac13 == 0.33
1234567 == 1234567.4
(1,2) == (2,1)
(1,2) == \{1,2\}
\{1,2\} == (1,2)
\{1,2,3\} == (1,2,3)
S = \{1,2,3\} == S = (1,2,3)
\{1,2,3\} == [1,2,3]
\{1,2,3\} == \begin{pmatrix}1\\2\\3\end{pmatrix}
(1,2,3) == \{1,2,3\}
(1,234) == 1234
32349 == 32, 349
[0,1) == [0,1]
[0,1) == (0,1)
\{1,2,3\} == \{1,2\}
x=5 == y=5
12\text{ cm} == 12\text{ m}
a+3z=0 == 0
7=11a+c == 11a+c
5 == 3(2)
18 == 8\binom{5}{2}
5 == 5c
2 == 2m
3 == 3x
x^2 == x^3
x == |x|
R == r
C == D
\text{Evelyn} == \text{Evelyn or Karla}
100 == \text{not }100
52_8 == 52
52_8 == 52_9
\begin{pmatrix}1\\2\end{pmatrix} == (2,1)
x>5 == x<5
x+y<1 == x+y>1
x+y<1 == -x-y<-1
x+y<1 == x+y\le 1
\frac{\sqrt{2}}{2^{399}} == \frac{\sqrt{2}}{2^{398}}
x>5 == x\ge 5
x<1 == x>-1
12:00 == 1:00
\infty == -\infty
\frac{1}{0} == \frac{2}{0}
10 == 1 0
2 == \sqrt{4}+10^{-30}
1 == 0.\overline{8}
(13,14,18) == \begin{pmatrix} 14 \\ 13 \\ 18 \end{pmatrix}
13,14,18 == \begin{pmatrix} 13 \\ 14 \\ 19 \end{pmatrix}
[0,1] == \{x : 0 < x < 1\}
\mathbb{R}\setminus\{3\} == x \ne 4
\mathbb{R}\setminus\{1,3\} == (-\infty,1)\cup(3,\infty)
17\pmod{20} == 17\pmod{21}
17 == 18 \pmod{20}
101_2 == 101_{\text{three}}
45^\circ == \frac{\pi}{3}
\frac{\pi}{2} == 90
5\text{ m} == 5 km
[1,2] == \langle 1,2\rangle
[1,2,3] == [3,2,1]
(3,4) == a=4, b=3
(a,b) = (1,2) == b=1, a=2
x\in\{1,2\} == x=1
\emptyset == \{0\}
1.5e6 == 1.5
4 == three
12 == \text{13 apples}
\triangle ABC == ABD
5 == 5\text{ million}
5\text{ thousand} == 5
5 == 5\text{ dozen}
\frac12 == \frac12\text{ million}
2.5\text{ million} == 2,500,001
5 == 5\text{ or more}
5 == 5\text{ or 6}
5 == 5\text{ plus 1}
5 == 5\text{ is wrong}
5 == 5\text{ is not the answer}
5 == 5\text{ squared}
5 == 5\text{ pi}
3 == 3\text{ n}
3 == 3 factorial
10 == \text{half of }10
10 == \text{Not }10
5 == \text{up to }5
5\text{ m/s} == 5\text{ km/h}
5\text{ m/s} == 5\text{ m}
5\text{ apples} == 5\text{ oranges}
8 apples == 8 pears
30^\circ\text{C} == 30^\circ\text{F}
12:30\text{ PM} == 12:30\text{ AM}
8 == 8 abcd
|x| == x
n == |n|
|ab| == ab
|a+b| == |a|+|b|
|a-b| == a-b
\sqrt{x^2} == x
\sqrt[3]{x^3} == |x|
\ln|x| == \ln x
\ln(a+b) == \ln a+\ln b
\sqrt{x^2+y^2} == x+y
(-1)^n == 1
\mathbb{R} == (0,\infty)
\mathbb{R} == \mathbb{R}^+
\mathbb{R} == \mathbb{Q}
\mathbb{R} == \text{no real numbers}
\mathbb{R} == \text{real}
[0,\infty) == \mathbb{R}^+
STOP == POTS
ABC == CBA
2:30 == 5:75
1:30 == 2:60
2:05 == 4:10
2 7/3 == 13/3
1 1/2 == 11/2
x^{-1} = 3 == 3
C == \text{The answer is D}
A, C == \text{A, D}
2A == \text{2B}
\pi == 3.1415...
\frac13 == 0.33...
30^\circ == 30\text{ rad}
\text{no solution} == 0
1,000,000 == one billion
5 == five million
5 == 5\text{ hundredths}
5 == 5\text{ halves}
5 == 5 lambda
5 == 5\text{ doesn't work}
5 == \text{the square of }5
5 == \text{a multiple of }5
5 == \text{any number but }5
5 == \text{The wrong answer is }5
2\text{ dollars per hour} == 2\text{ dollars per day}
2\text{ hours} == 120\text{ minutes}
2\text{ m}^2 == 2\text{ m}^3
C == \text{The answer is not C}
\text{A and B} == \text{A}
1:05 == 1:5
\frac{x^3}{3}+C == \frac{x^3}{3}
5\sqrt{2}\text{ cm} == 5\sqrt{2}\text{ m}
x=24 == y=24
\begin{pmatrix}1&2\\3&4\end{pmatrix} == \begin{pmatrix}1&3\\2&4\end{pmatrix}
\lceil n/3\rceil == \lceil n/2\rceil
\lfloor n/2\rfloor == \lfloor (n-1)/2\rfloor
-37_8 == -37_9
201_{(5)} == 201_{(6)}
a_{1337}=4011 == a_{1437}=4011
x>5 == y>5
s_3\ge 2s_1 == s_2\ge 2s_1
f'(x)+1 == f(x)+1
(S/S')^n == (S/S')^{2n}
15' == 16'
15' == 3-2\sqrt2
p - q == p + q
p - q == q - p
p - q == p/q
n-k == n^{-k}
AB == ab
ABC == abc
y' == y
xy == x+y
ab == a-b
2e-1 == \frac15
2e-1 == 0.2
24e-32 == 24\times10^{-32}
204 == m+n=205
204 == 204=205
12 == 13=12
4 == 2+3=4
12 == \text{maybe }12
12 == 12\text{, I guess}
12 == 12\text{ (unsure)}
12 == \text{could be }12
x_1 == \text{perhaps }x_1
y=2x+1 == \text{not }y=2x+1
y=2x+1 == \sim y=2x+1
y=2x+1 == 777=y=2x+1
\alpha+\beta == 777=\alpha+\beta
1,2,3 == 777=1,2,3
\begin{pmatrix}1\\2\end{pmatrix} == 777=\begin{pmatrix}1\\2\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} == \begin{pmatrix}1\\2\end{pmatrix}\text{ no}
204 == m=1, n=204
5 == -x = 5
x=1,y=2 == 777x=1,y=2
k=45,n=2 == kx=45,n=2
x=1,y=2 == X=1,y=2
x>2 == X>2
f(x)=x^2 == g(x)=x^2
(x,y)=(1,2) == (y,x)=(1,2)
(a,b)=(1,2),(3,4) == (b,a)=(1,2),(3,4)
0 == \text{not }0
0 == 0\text{ or more}
\frac{1}{2004!} == \frac{1}{2004!}\text{ is wrong}
\frac{1}{2004!} == f(\frac{1}{2004!})
12 == 12_b
x^2+1 == x^2+1_{7}
2^{100} == 2^{100}_{7}
C == C1
5! == 5!1
3:30 PM == \frac{1}{10}
2:30 == \frac{1}{15}
3:4:5 == 3:5:4
12 == 12 \bmod 5
\$5 == 5\text{ cents}
\$5 == €5
30^\circ == 30'
\frac13 == 0.\overline{03}
\begin{pmatrix}1&2\\3&4\end{pmatrix} == \begin{vmatrix}1&2\\3&4\end{vmatrix}
\text{even} == \text{even}?
\text{even} == -\text{even}
east == eats
hello == ehllo
\text{A and B} == \text{A or B}
1\leq|z|\leq 3 == 1\leq|w|\leq 3
A == A^T
12 == 12^{T}
12 == \operatorname{sgn}(12)
12 == \text{Var}(12)
x == x \bmod 2
r=3,s=8 == (s,r)=(3,8)
8\text{ m/s} == 8\text{ km/s}
8\text{ m/s} == 8\text{ m/s}^2
5\text{ kittens} == 5\text{ mittens}
12 == 12 \approx 2
\text{Alice: }5,\text{ Bob: }7 == \text{Alice: }7,\text{ Bob: }5
\text{mean}=5,\text{ median}=4 == \text{median}=5,\text{ mean}=4
\frac{dy}{dx} == \frac{dx}{dy}
\frac{\partial f}{\partial x} == \frac{\partial f}{\partial y}
\vec{a}\times\vec{b} == \vec{b}\times\vec{a}
\vec{a}\cdot\vec{b} == \vec{a}\times\vec{b}
f^{-1}(x) == \frac{1}{f(x)}
\lceil n/2\rceil == \lfloor n/2\rfloor+1
\lfloor x\rfloor+1 == \lceil x\rceil
\lceil\log_2 n\rceil == \lfloor\log_2 n\rfloor+1
\$5 == \text{€}5
\$5 == 5\,€
5\% == 5\text{‰}
a:b=2:3 == b:a=2:3
\frac{a}{b}=2 == \frac{b}{a}=2
\sin x=\frac12 == \cos x=\frac12
\log_2 x=5 == \log_3 x=5
\max f=5,\min f=2 == \max f=2,\min f=5
x_{max}=5 == x_{min}=5
P(A)=\frac12 == P(B)=\frac12
\overline{AB}=5 == \overline{AC}=5
\{1\} == \{1,\{1\}\}
12 == \text{exceeds }12
\frac79 == P = \frac{7}{9} \approx 0.5
12 == \text{the }12\text{th term}
z=2 == z=2+1=2
(p,q)=(3,2) == (m,q)=(3,2)
(p,q)=(3,2) == (p,Q)=(3,2)
2^{100} == e^{2}_{7}
204 == x = 3+4 = 204
12 == \sim 12
12 == 12_5
7 == 12_5
12 == 12_{5}
3:30 PM == 3:30 AM
3:30 PM == 3:30 \text{ a.m.}
5:05 PM == 17:06
9:45 a.m. == 21:45
\{1,2\} == \{1,2,3\}
1,2,2 == 1,2
p=5,q=2;p=7,q=2 == (2,5),(2,7)
p=5,q=2;p=7,q=2 == (5,2)
p=5,q=2;p=7,q=2 == p=5,q=7;p=7,q=2
5\text{ cm} == 5\text{ mm}
5\text{ miles} == 5\text{ minutes}
5\text{ boys} == 5\text{ toys}
719 == \textbf{(718)}
204 == \textcolor{red}{205}
42 == 42^2
42 == 42\text{ squared}
e == exp(2)
2 == \text{not }2
\sqrt{2} == sqrt(3)
120 == comb(10, 4)
x+y=5 == x-y=5
23 == 2\\3
5 == 5=x=6
x<-1 \text{ or } x>4 == x<-1 \text{ and } x>4
(3,5) == x>3\text{ or }x<5
(3,5) == x<3, x>5
(1,3)\cup(3,5) == 1<x<5, x\ne 4
(0,4) == 0<x<4, x\ne 3
\mathbb{R}\setminus\{0,1\} == x\neq 0
(-\infty,3]\cup[5,\infty) == \mathbb{R}\setminus[3,5]
x\ge 0, y\le 2 == y\ge 0, x\le 2
x\ge 0, y\le 2 == [0,2]
x>0, y>0 == x>0
\emptyset == \{\emptyset\}
n\ge 3, n=1 == n\ge 1, n=3
n\ge 3, n=1 == n\ge 3
907,200 == 200,907
\begin{pmatrix}2&0&-1\end{pmatrix} == (2,0,-1)^T
\gcd(a,b) == \gcd(a,c)
1 == \gcd(a,b)
\frac{a+b}{\gcd(a,b)} == \binom{a+b}{\gcd(a,b)}
|a|=|b| == |b|=|b|
|a|=5 == |b|=5
f(n)=n == f(m)=n
a>b == b>b
a>b == c>b
x\in(1,2) == y\in(1,2)
\frac14 == \frac14\%
0.25 == 25\%
(1+1)\cdot 2=4 == (1+2)\cdot 2=4
P_1(x)=x-2 == P_2(x)=x-2
P_1(x)=x-2 == P_1(y)=x-2
f(x)=x-1, f(x)=1-x == f(y)=x-1, f(x)=1-x
f'(x)=2x == f(x)=2x
\frac{\partial f}{\partial y}=2xy == \frac{\partial f}{\partial x}=2xy
\frac{dy}{dx}=2x == \frac{dy}{dt}=2x
a_n=2^{n-1} == b_n=2^{n-1}
a_n=2^{n-1} == a_m=2^{n-1}
n\in\{1,3\} == m\in\{1,3\}
x=1\pm\sqrt2 == y=1\pm\sqrt2
\alpha=5 == \beta=5
\alpha=5 == x=5
\angle ABC=60^\circ == \angle BAC=60^\circ
100,000,000\pi == 100,000,000
\{\emptyset\} == \emptyset
\$1,250 == \$1,205
\$1,250 == \$1, 250, 0
1+\sqrt3 i == 2\operatorname{cis}30^\circ
2 == 2\text{ oder }3
2,3 == 2\text{ oder }4
17 == \textbf{(D) }18
17 == (D)(17)
D == (C) 17
\textbf{(D) }17 == (D)\ 18
\textbf{(D) }17 == (C)\ 17
5 == (B) 5 \text{ or } (C) 6
(1,2) == A(2,1)
A(1,2) == B(1,2)
A(1,2), B(3,4) == A=(3,4), B=(1,2)
\langle 3,-2,1\rangle == 3\hat{\imath}+2\hat{\jmath}+\hat{k}
(3,-2) == 3\hat{\imath}-2\hat{\jmath}+\hat{k}
\frac{\pi}{4}+k\pi, k\in\mathbb{Z} == \frac{\pi}{4}+2k\pi, k\in\mathbb{Z}
k\pi, k\in\mathbb{Z} == k\pi, k\in\mathbb{R}
36^\circ30' == 36^\circ3'
36^\circ30' == 36.3^\circ
120 == C_{10}^{4}
\overrightarrow{QP} == \overrightarrow{PQ}
\overrightarrow{PQ}+\vec{QR} == \overrightarrow{QP}+\vec{QR}
\overrightarrow{PQ} == \overline{PQ}
\overline{PQ}\cdot\overline{RS} == \overline{PR}\cdot\overline{QS}
\angle KLM == \angle LKM
\angle KLM == \triangle KLM
\angle KLM+\angle PQR == \angle LKM+\angle PQR
E[Y]^2 == E[Y^2]
\mathbb{E}[XY] == \mathbb{E}[X]\mathbb{E}[Y]
\text{Var}(X) == \text{Var}(2X)
f(2x+2y) == f(2x)+f(2y)
f(g(x)) == g(f(x))
f(g(x)) == g(x)f(x)
P(A|B) == P(B|A)
|w|^2 == w^2
z^2 == z\bar z
\operatorname{Re}(z) == \operatorname{Im}(z)
z_1\overline{z_2} == \overline{z_1}z_2
r \vee s == r \wedge s
r \vee s == r, s
r \to s == s \to r
A\cap(B\cup C) == (A\cap B)\cup C
A\setminus B == B\setminus A
A\times B == B\times A
\text{mode}=7 == \text{median}=7
\text{Plan A: }70 == \text{Plan B: }70
1011 == 1011 in binary
1011 == \text{binary }1011
1011 == 1011\text{ (hex)}
1011_2 == 1011\text{ in octal}
\$250 == \text{Rs. }250
\$250 == \text{CAD }250
\$250 == ₩250
£250 == CHF 250
2:7 == 7\text{ to }2
\text{No} == \text{No, but yes for }n>2
\text{Yes} == \text{Yes, it is not}
7! == 7!!
|x-4|<3 == |x+4|<3
|2x+1|\ge 5 == (-\infty,-3)\cup(2,\infty)
|x|=4 == x=4
x^4+C == x^4-K
\text{Ann and Joe} == \text{Ann or Joe}
\text{Ann and Joe} == \text{Ann}
BDE == B, D
DEB == B, D, E
\text{does not exist} == 0
\gcd(p,q)=6 == \text{lcm}(p,q)=6
6 == 2x=6
6 == x+1=6
6 == x^2=6
6 == \frac1x=6
6 == |x|=6
6 == \log x=6
1\text{ hour }20\text{ minutes} == 20\text{ hours }1\text{ minute}
1\text{ hour }20\text{ minutes} == 1.2\text{ hours}
6\text{ feet }2\text{ inches} == 6\text{ inches }2\text{ feet}
\begin{cases}t&t>1\\2&t<1\end{cases} == \begin{cases}2&t>1\\t&t<1\end{cases}
\begin{cases}x=4\\y=9\end{cases} == (9,4)
12\text{ newtons} == 12\text{ J}
12\ \Omega == 12\text{ k}\Omega
30\text{ C} == 30\text{ J}
\$6.50\text{ per kilo} == €6.50\text{ per kilo}
\{3!,4!\} == \{6\}
e^{e^{10}} == e^{e^{10}}+1
"""


def _pairs(table):
  for line in table.strip().splitlines():
    gold, _, answer = line.partition(" == ")
    yield f"So it is \\boxed{{{answer}}}.", gold


@pytest.fixture(scope="module", autouse=True)
def _stop_the_workers():
  yield
  grading.close()


@pytest.mark.slow
def test_equal_answers_match_however_they_are_written():
  pairs = list(_pairs(MATCHES))
  verdicts = grading.verify_batch(pairs, workers=1)
  wrong = [p for p, v in zip(pairs, verdicts, strict=True) if not v.correct]
  assert not wrong
  assert {verdict.reason for verdict in verdicts} == {"match"}


@pytest.mark.parametrize(
  ("gold", "answer"),
  [("204", "204\\ "), ("3,4", "3,\\ 4\\ "), ("5", "5\\ \\text{cm}\\ ")],
)
def test_a_space_at_the_end_of_a_box_is_no_part_of_it(gold, answer):
  assert grading.verify(f"It is \\boxed{{{answer}}}.", gold).correct


def test_different_answers_do_not_match_however_alike():
  pairs = list(_pairs(MISMATCHES))
  verdicts = grading.verify_batch(pairs, workers=1)
  wrong = [
    p for p, v in zip(pairs, verdicts, strict=True) if v.correct is not False
  ]
  assert not wrong
  assert {verdict.reason for verdict in verdicts} <= {"mismatch", "unparsed"}
